-- arena_put: token of the writer, capture, attempt, chunk index, payload bytes, extents, whether to record them
-- Notes where the bytes of a chunk lie; they are there already. Returns extents that were freed since it was called last.
local capture, attempt, index = ARGV[2], ARGV[3], tonumber(ARGV[4])
local fields = redis.call('HMGET', sample_key(capture), 'state', 'attempt', 'bytes', 'chunks', 'stored', 'size:' .. index)
if fields[1] ~= 'inserting' or tonumber(fields[2]) ~= tonumber(attempt) then
  return { 'STALE', fields[1] or 'gone', fields[2] or '' }
end
if index > tonumber(fields[4]) then
  return { 'GAP', fields[4] }
end
local stored = tonumber(fields[5]) - tonumber(fields[6] or 0) + tonumber(ARGV[5])
if stored > tonumber(fields[3]) then
  return { 'OVERFLOW', stored, fields[3] }
end
if redis.call('HGET', key('table'), 'arena') ~= ARGV[1] then
  return { 'FENCED' }
end
if ARGV[7] == '1' then
  local before = redis.call('HGET', sample_key(capture), 'at:' .. index)
  if before and before ~= ARGV[6] then
    redis.call('RPUSH', key('freed'), before .. ';')
  end
  redis.call('HSET', sample_key(capture), 'chunks', math.max(tonumber(fields[4]), index + 1), 'stored', stored,
    'size:' .. index, ARGV[5], 'at:' .. index, ARGV[6])
end
local freed = redis.call('LRANGE', key('freed'), 0, 99)
redis.call('LTRIM', key('freed'), #freed, -1)
table.insert(freed, 1, 'OK')
return freed
