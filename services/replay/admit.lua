-- admit: capture, attempt, bytes, number of uses, now, outcome (for a job whose sample is there already), whether the
-- job comes from the work queue
local capture, attempt, num_bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if table_is_lost() then
  return { 'LOST' }
end
if ARGV[7] == '1' then
  local entry = redis.call('HGET', key('work:jobs'), capture)
  if not entry or attempt_of(entry) ~= attempt then
    return { 'GONE' }
  end
end
local limits = redis.call('HMGET', key('table'), 'capacity', 'max_times_sampled')
if num_bytes > tonumber(limits[1]) then
  return { 'TOO_LARGE', limits[1] }
end
if tonumber(ARGV[4]) > tonumber(limits[2]) then
  return { 'USES', limits[2] }
end

local known = redis.call('HMGET', sample_key(capture), 'state', 'attempt', 'bytes')
if known[1] == 'resident' then
  if forget_job(capture) then
    redis.call('RPUSH', key('outcomes'), ARGV[6])
  end
  return { 'KNOWN' }
end
if known[1] and attempt <= tonumber(known[2]) then
  return { 'KNOWN' }
end
if known[1] then
  -- A newer attempt takes over the space of the one it replaces, so it can never wait behind a full buffer.
  free_inserting(capture)
end

local promise = promise_of(tonumber(ARGV[4]))
local resident = tonumber(redis.call('HGET', key('table'), 'resident'))
if resident + num_bytes > tonumber(limits[1]) then
  redis.call('HSET', key('table'), 'wanted', ARGV[3])
  return { 'FULL' }
end
if not known[1] and not can_insert(promise) then
  return { 'FULL' }
end
resident = count('resident', num_bytes)
if resident > tonumber(redis.call('HGET', key('table'), 'peak')) then
  redis.call('HSET', key('table'), 'peak', resident)
end
count('promising', promise)
redis.call('HSET', key('table'), 'wanted', 0)
redis.call('HSET', sample_key(capture), 'state', 'inserting', 'attempt', ARGV[2], 'bytes', ARGV[3], 'chunks', 0,
  'stored', 0, 'promise', promise, 'admitted_s', ARGV[5])
redis.call('SADD', key('inserting'), capture)
return { 'ADMITTED' }
