-- info: the counters of the table, then the numbers of ready samples, leases, and captures being inserted
if table_is_lost() then
  return { 'LOST' }
end
local reply = redis.call('HMGET', key('table'), 'resident', 'peak', 'capacity', 'inserts', 'samples', 'deletes', 'sealed')
table.insert(reply, 1, 'OK')
reply[#reply + 1] = redis.call('ZCARD', key('ready'))
reply[#reply + 1] = redis.call('HLEN', key('leases'))
reply[#reply + 1] = redis.call('SCARD', key('inserting'))
return reply
