-- place: capture, attempt, chunk index, payload bytes
-- Makes the empty key that the payload is then SET into with XX: a payload that arrives after its sample was freed
-- finds no key and leaves nothing behind. Answers how many chunks the attempt has now.
local capture, index, num_bytes = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local stored, stale = stored_by(capture, ARGV[2])
local refusal = stale or add_chunk(stored, capture, index, num_bytes)
if refusal then
  return refusal
end
local chunk = chunk_key(capture, stored.attempt, index)
if redis.call('EXISTS', chunk) == 0 then
  redis.call('SET', chunk, '')
end
redis.call('HSET', sample_key(capture), 'chunks', stored.num_chunks, 'stored', stored.num_bytes,
  'size:' .. index, num_bytes)
return { 'OK', stored.num_chunks }
