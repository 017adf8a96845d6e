-- push: capture, entry
-- A capture is in the queue once; a newer attempt replaces an older one where it stands.
local known = redis.call('HGET', key('work:jobs'), ARGV[1])
if not known then
  redis.call('RPUSH', key('work:queue'), ARGV[1])
end
if not known or attempt_of(known) < attempt_of(ARGV[2]) then
  redis.call('HSET', key('work:jobs'), ARGV[1], ARGV[2])
  return { 'OK' }
end
return { 'KNOWN' }
