-- give back: capture, attempt
-- A taken job returns to the front of the queue with its next attempt, unless it was given out again since.
local entry = redis.call('HGET', key('work:jobs'), ARGV[1])
if not entry or attempt_of(entry) ~= tonumber(ARGV[2]) or redis.call('ZREM', key('work:taken'), ARGV[1]) == 0 then
  return { 'UNKNOWN' }
end
redis.call('HSET', key('work:jobs'), ARGV[1], with_attempt(entry, attempt_of(entry) + 1))
redis.call('LPUSH', key('work:queue'), ARGV[1])
return { 'OK' }
