-- arena_put: token of the writer, capture, attempt, chunk index, payload bytes, extents, whether to record them
-- Notes where the bytes of a chunk lie; they are there already. Returns extents that were freed since it was called last.
local capture, index = ARGV[2], tonumber(ARGV[4])
local refusal, stored, num_chunks = check_chunk(capture, ARGV[3], index, ARGV[5])
if refusal then
  return refusal
end
if redis.call('HGET', key('table'), 'arena') ~= ARGV[1] then
  return { 'FENCED' }
end
if ARGV[7] == '1' then
  local before = redis.call('HGET', sample_key(capture), 'at:' .. index)
  if before and before ~= ARGV[6] then
    redis.call('RPUSH', key('freed'), before .. ';')
  end
  redis.call('HSET', sample_key(capture), 'chunks', num_chunks, 'stored', stored,
    'size:' .. index, ARGV[5], 'at:' .. index, ARGV[6])
end
local freed = redis.call('LRANGE', key('freed'), 0, 99)
redis.call('LTRIM', key('freed'), #freed, -1)
table.insert(freed, 1, 'OK')
return freed
