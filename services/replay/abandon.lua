-- abandon: capture, attempt, outcome
-- Ends an attempt that is being inserted, or a taken job that was never admitted. Anything else is left alone.
local capture, attempt = ARGV[1], tonumber(ARGV[2])
local fields = redis.call('HMGET', sample_key(capture), 'state', 'attempt')
local entry = redis.call('HGET', key('work:jobs'), capture)
if fields[1] == 'inserting' and tonumber(fields[2]) == attempt then
  free_inserting(capture)
elseif fields[1] or not entry or attempt_of(entry) > attempt then
  return { 'STALE' }
end
forget_job(capture)
redis.call('RPUSH', key('outcomes'), ARGV[3])
return { 'OK' }
