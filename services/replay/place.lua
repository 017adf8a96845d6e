-- place: capture, attempt, chunk index, payload bytes
-- Makes the empty key that the payload is then SET into with XX: a payload that arrives after its sample was freed
-- finds no key and leaves nothing behind. Answers how many chunks the attempt has now.
local capture, index = ARGV[1], tonumber(ARGV[3])
local refusal, stored, num_chunks, attempt = check_chunk(capture, ARGV[2], index, ARGV[4])
if refusal then
  return refusal
end
local chunk = chunk_key(capture, attempt, index)
if redis.call('EXISTS', chunk) == 0 then
  redis.call('SET', chunk, '')
end
redis.call('HSET', sample_key(capture), 'chunks', num_chunks, 'stored', stored, 'size:' .. index, ARGV[4])
return { 'OK', num_chunks }
