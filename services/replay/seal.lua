-- seal: nothing more will be inserted, so a lease may return fewer uses than it asked for
if table_is_lost() then
  return { 'LOST' }
end
redis.call('HSET', key('table'), 'sealed', 1)
return { 'OK' }
