-- arena_adopt: token of the writer
-- From here on only this writer's chunks are recorded, and what is freed is noted for it. Returns the capacity, and the
-- extents of all samples at this moment: what was noted for an earlier writer is free in these already.
if table_is_lost() then
  return { 'LOST' }
end
redis.call('HSET', key('table'), 'arena', ARGV[1])
redis.call('DEL', key('freed'))
local reply = { 'OK', redis.call('HGET', key('table'), 'capacity') }
local captures = {}
for _, capture in ipairs(redis.call('SMEMBERS', key('inserting'))) do
  captures[capture] = true
end
for _, capture in ipairs(redis.call('ZRANGE', key('ready'), 0, -1)) do
  captures[capture] = true
end
for _, lease in ipairs(redis.call('HVALS', key('leases'))) do
  captures[parse_lease(lease)] = true
end
for capture in pairs(captures) do
  reply[#reply + 1] = extents_of(capture)
end
return reply
