-- info: names and values of the table's fields, and the numbers of ready samples, leases, and captures in flight
if table_is_lost() then
  return { 'LOST' }
end
local reply = redis.call('HGETALL', key('table'))
table.insert(reply, 1, 'OK')
for name, number in pairs({
  ready = redis.call('ZCARD', key('ready')),
  leased = redis.call('HLEN', key('leases')),
  inserting = redis.call('SCARD', key('inserting')),
}) do
  reply[#reply + 1] = name
  reply[#reply + 1] = tostring(number)
end
return reply
