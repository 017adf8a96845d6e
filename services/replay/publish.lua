-- publish: now, addresses …
-- The targets that answer are exactly these. Returns address and reason of each one that is quarantined.
local reply, quarantined = { 'OK' }, {}
redis.call('DEL', key('targets'))
for position = 2, #ARGV do
  redis.call('ZADD', key('targets'), ARGV[1], ARGV[position])
  local reason = redis.call('HGET', key('quarantined'), ARGV[position])
  if reason then
    quarantined[#quarantined + 1] = { ARGV[position], reason }
  end
end
redis.call('DEL', key('quarantined'))
for _, pair in ipairs(quarantined) do
  redis.call('HSET', key('quarantined'), pair[1], pair[2])
  reply[#reply + 1] = pair[1]
  reply[#reply + 1] = pair[2]
end
return reply
