-- set_generation: generation
-- Leases of older generations end. A sample of which no use was acked is whole again and goes back to ready; the
-- others are freed: the new generation may have to repeat the uses that were acked, so the capture is made again.
local generation = ARGV[1]
if table_is_lost() then
  return { 'LOST' }
end
local current = redis.call('HGET', key('table'), 'generation')
if tonumber(generation) < tonumber(current) then
  return { 'STALE', current }
end
if tonumber(generation) == tonumber(current) then
  return { 'OK' }
end
redis.call('HSET', key('table'), 'generation', generation, 'sealed', 0)
for _, lease_id in ipairs(redis.call('HKEYS', key('leases'))) do
  return_use(lease_id)
end
for _, capture in ipairs(redis.call('ZRANGE', key('ready'), 0, -1)) do
  local fields = redis.call('HMGET', sample_key(capture), 'attempt', 'num_uses', 'unacked', 'order')
  if fields[2] == fields[3] then
    redis.call('ZADD', key('ready'), fields[4], capture) -- the place it had before any lease
  else
    free_resident(capture)
    redis.call('RPUSH', key('outcomes'), string.format(
      '{"capture":%s,"attempt":%s,"kind":"failed","retry":true,"reason":"partly used when generation %s began"}',
      capture, fields[1], generation))
  end
end
return { 'OK' }
