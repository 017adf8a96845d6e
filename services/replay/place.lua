-- place: capture, attempt, chunk index, payload bytes
-- Makes the empty key that the payload is then SET into with XX: a payload that arrives after its sample was freed
-- finds no key and leaves nothing behind. Answers how many chunks the attempt has now.
local capture, attempt, index = ARGV[1], ARGV[2], tonumber(ARGV[3])
local fields = redis.call('HMGET', sample_key(capture), 'state', 'attempt', 'bytes', 'chunks', 'stored', 'size:' .. index)
if fields[1] ~= 'inserting' or tonumber(fields[2]) ~= tonumber(attempt) then
  return { 'STALE', fields[1] or 'gone', fields[2] or '' }
end
if index > tonumber(fields[4]) then
  return { 'GAP', fields[4] }
end
local stored = tonumber(fields[5]) - tonumber(fields[6] or 0) + tonumber(ARGV[4])
if stored > tonumber(fields[3]) then
  return { 'OVERFLOW', stored, fields[3] }
end
local chunk = chunk_key(capture, fields[2], index)
if redis.call('EXISTS', chunk) == 0 then
  redis.call('SET', chunk, '')
end
redis.call('HSET', sample_key(capture), 'chunks', math.max(tonumber(fields[4]), index + 1), 'stored', stored,
  'size:' .. index, ARGV[4])
return { 'OK', redis.call('HGET', sample_key(capture), 'chunks') }
