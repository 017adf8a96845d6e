-- expire: now
-- The use of every lease whose deadline has passed goes back to ready.
if table_is_lost() then
  return { 'LOST' }
end
local reply = { 'OK' }
for _, lease_id in ipairs(redis.call('ZRANGEBYSCORE', key('deadlines'), '-inf', '(' .. ARGV[1])) do
  reply[#reply + 1] = return_use(lease_id)
end
return reply
