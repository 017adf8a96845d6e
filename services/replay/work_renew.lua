-- renew: capture, attempt, deadline
-- Keeps a taken job taken, and notes its newest attempt so that whoever takes it next counts on from there.
local entry = redis.call('HGET', key('work:jobs'), ARGV[1])
if not entry or not redis.call('ZSCORE', key('work:taken'), ARGV[1]) then
  return { 'UNKNOWN' }
end
redis.call('ZADD', key('work:taken'), ARGV[3], ARGV[1])
if attempt_of(entry) < tonumber(ARGV[2]) then
  redis.call('HSET', key('work:jobs'), ARGV[1], with_attempt(entry, ARGV[2]))
end
return { 'OK' }
