-- clear: generation, incarnation
-- Drops every sample, lease and job: whoever writes or reads under the old incarnation finds nothing any more. Returns
-- the outcomes that nobody has drained, because the captures that they tell of were made.
local generation, incarnation = ARGV[1], ARGV[2]
if table_is_lost() then
  return { 'LOST' }
end
local current = redis.call('HGET', key('table'), 'generation')
if tonumber(generation) < tonumber(current) then
  return { 'STALE', current }
end
for _, lease_id in ipairs(redis.call('HKEYS', key('leases'))) do
  return_use(lease_id)
end
for _, capture in ipairs(redis.call('ZRANGE', key('ready'), 0, -1)) do
  free_resident(capture)
end
for _, capture in ipairs(redis.call('SMEMBERS', key('inserting'))) do
  free_inserting(capture)
end
local reply = redis.call('LRANGE', key('outcomes'), 0, -1)
table.insert(reply, 1, 'OK')
redis.call('DEL', key('outcomes'), key('work:queue'), key('work:jobs'), key('work:taken'))
redis.call('HSET', key('table'), 'generation', generation, 'incarnation', incarnation, 'sealed', 0, 'wanted', 0,
  'inserts', 0, 'samples', 0, 'deletes', 0)
return reply
