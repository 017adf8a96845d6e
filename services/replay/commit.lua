-- commit: capture, attempt, bytes, now, sample, outcome, number of chunks, size of each chunk …, k of each use …
local capture, attempt, num_chunks = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[7])
if table_is_lost() then
  return { 'LOST' }
end
local fields = redis.call('HMGET', sample_key(capture), 'state', 'attempt', 'bytes', 'chunks', 'promise')
if fields[1] == 'resident' and tonumber(fields[2]) == attempt then
  return { 'KNOWN' }
end
if fields[1] ~= 'inserting' or tonumber(fields[2]) ~= attempt then
  return { 'STALE', fields[1] or 'gone', fields[2] or '' }
end
local spare = tonumber(fields[3]) - tonumber(ARGV[3])
if spare < 0 then
  return { 'BYTES', ARGV[3], fields[3] }
end
if tonumber(fields[4]) ~= num_chunks then
  return { 'CHUNKS', fields[4] }
end
local extents = extents_of(capture)
local sizes = extents ~= '' and fields_of_chunks(capture, 'size', num_chunks)
local arrived = 0
for index = 0, num_chunks - 1 do
  local size = tonumber(sizes and sizes[index + 1] or redis.call('STRLEN', chunk_key(capture, fields[2], index)))
  if size ~= tonumber(ARGV[8 + index]) then
    return { 'SIZE', index, size, ARGV[8 + index] }
  end
  arrived = arrived + size
end
if arrived ~= tonumber(ARGV[3]) then
  return { 'ARRIVED', arrived, ARGV[3] }
end

local order = redis.call('HINCRBY', key('table'), 'order', 1)
local num_uses = 0
for position = 8 + num_chunks, #ARGV do
  redis.call('ZADD', uses_key(capture), ARGV[position], ARGV[position])
  num_uses = num_uses + 1
end
local promise = promise_of(num_uses)
count('resident', -spare) -- reserved for a longer answer than the target gave
count('promising', -tonumber(fields[5]))
count('promised', promise)
count('uses', num_uses)
redis.call('DEL', sample_key(capture))
redis.call('HSET', sample_key(capture), 'state', 'resident', 'attempt', fields[2], 'bytes', ARGV[3], 'chunks',
  fields[4], 'record', ARGV[5], 'order', order, 'num_uses', num_uses, 'unacked', num_uses, 'promise', promise,
  'weight', 1, 'committed_s', ARGV[4])
if extents ~= '' then
  redis.call('HSET', sample_key(capture), 'extents', extents)
end
redis.call('SREM', key('inserting'), capture)
enter_line(capture, order)
count('inserts', 1)
redis.call('RPUSH', key('outcomes'), ARGV[6])
forget_job(capture)
return { 'OK' }
