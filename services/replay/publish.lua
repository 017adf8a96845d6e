-- publish: now, addresses …
-- The targets that answer are exactly these.
redis.call('DEL', key('targets'))
for position = 2, #ARGV do
  redis.call('ZADD', key('targets'), ARGV[1], ARGV[position])
end
return { 'OK' }
