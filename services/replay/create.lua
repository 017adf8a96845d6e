-- create: signature, capacity bytes, most uses of a sample, incarnation, min_size, samples_per_insert, min_diff,
-- max_diff, largest lease, selector, priority exponent, importance exponent
local current = redis.call('HMGET', key('table'), 'signature', 'resident')
if current[1] and current[1] ~= ARGV[1] then
  return { 'SIGNATURE', current[1] }
end
if current[1] and tonumber(current[2]) > tonumber(ARGV[2]) then
  return { 'SHRUNK', current[2] }
end
if not current[1] then
  redis.call('HSET', key('table'), 'signature', ARGV[1], 'incarnation', ARGV[4], 'generation', 0)
  empty_table()
end
redis.call('HSET', key('table'), 'capacity', ARGV[2], 'max_times_sampled', ARGV[3], 'min_size', ARGV[5],
  'samples_per_insert', ARGV[6], 'min_diff', ARGV[7], 'max_diff', ARGV[8], 'largest_lease', ARGV[9],
  'selector', ARGV[10], 'priority_exponent', ARGV[11], 'importance_exponent', ARGV[12])
return { 'OK' }
