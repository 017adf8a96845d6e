-- done: capture, attempt
local entry = redis.call('HGET', key('work:jobs'), ARGV[1])
if entry and attempt_of(entry) == tonumber(ARGV[2]) then
  forget_job(ARGV[1])
  return { 'OK' }
end
return { 'UNKNOWN' }
