-- create: signature, capacity bytes, most uses of a sample, incarnation
local current = redis.call('HMGET', key('table'), 'signature', 'resident')
if not current[1] then
  redis.call('HSET', key('table'), 'signature', ARGV[1], 'capacity', ARGV[2], 'max_times_sampled', ARGV[3],
    'incarnation', ARGV[4], 'resident', 0, 'peak', 0, 'generation', 0, 'sealed', 0, 'order', 0, 'lease', 0,
    'inserts', 0, 'samples', 0, 'deletes', 0)
  return { 'OK' }
end
if current[1] ~= ARGV[1] then
  return { 'SIGNATURE', current[1] }
end
if tonumber(current[2]) > tonumber(ARGV[2]) then
  return { 'SHRUNK', current[2] }
end
redis.call('HSET', key('table'), 'capacity', ARGV[2], 'max_times_sampled', ARGV[3])
return { 'OK' }
