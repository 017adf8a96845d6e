-- arena_put: token of the writer, capture, attempt, then for each chunk: index, payload bytes, extents
-- Notes where the bytes of chunks lie; they are there already. Extents '?' only ask whether the chunk would be taken. All
-- chunks are noted or, where one is refused, none. Returns extents that were freed since it was called last.
local capture = ARGV[2]
local stored, refusal = stored_by(capture, ARGV[3])
local num_before = stored and stored.num_chunks
local fields, replaced = {}, {}
for place = 4, #ARGV, 3 do
  local index, num_bytes, extents = tonumber(ARGV[place]), tonumber(ARGV[place + 1]), ARGV[place + 2]
  refusal = refusal or add_chunk(stored, capture, index, num_bytes)
  if refusal then
    return refusal
  end
  if extents ~= '?' then
    local before = index < num_before and redis.call('HGET', sample_key(capture), 'at:' .. index)
    if before and before ~= extents then
      replaced[#replaced + 1] = before
    end
    for _, field in ipairs({ 'size:' .. index, num_bytes, 'at:' .. index, extents }) do
      fields[#fields + 1] = field
    end
  end
end
if redis.call('HGET', key('table'), 'arena') ~= ARGV[1] then
  return { 'FENCED' }
end
for _, extents in ipairs(replaced) do
  redis.call('RPUSH', key('freed'), extents .. ';')
end
if #fields > 0 then
  redis.call('HSET', sample_key(capture), 'chunks', stored.num_chunks, 'stored', stored.num_bytes, unpack(fields))
end
local freed = redis.call('LRANGE', key('freed'), 0, 99)
redis.call('LTRIM', key('freed'), #freed, -1)
table.insert(freed, 1, 'OK')
return freed
