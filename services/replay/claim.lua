-- claim: owner, time to live in ms
local owner = redis.call('GET', key('owner'))
if owner and owner ~= ARGV[1] then
  return { 'OWNED', owner, redis.call('PTTL', key('owner')) }
end
redis.call('SET', key('owner'), ARGV[1], 'PX', ARGV[2])
return { 'OK' }
