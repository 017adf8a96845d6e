-- give back: capture, entry
-- A taken job returns to the front of the queue.
if redis.call('ZREM', key('work:taken'), ARGV[1]) == 0 then
  return { 'UNKNOWN' }
end
redis.call('HSET', key('work:jobs'), ARGV[1], ARGV[2])
redis.call('LPUSH', key('work:queue'), ARGV[1])
return { 'OK' }
