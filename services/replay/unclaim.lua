-- unclaim: owner
if redis.call('GET', key('owner')) == ARGV[1] then
  redis.call('DEL', key('owner'))
end
return { 'OK' }
