-- update_priorities: capture, priority, capture, priority …
-- Samples that are not here may have been used up. Returns the number of those that are.
if table_is_lost() then
  return { 'LOST' }
end
local exponent = tonumber(redis.call('HGET', key('table'), 'priority_exponent'))
local updated = 0
for position = 1, #ARGV, 2 do
  local capture = ARGV[position]
  if redis.call('HGET', sample_key(capture), 'state') == 'resident' then
    local weight = format_number(tonumber(ARGV[position + 1]) ^ exponent)
    redis.call('HSET', sample_key(capture), 'weight', weight)
    redis.call('ZADD', key('weights'), 'XX', weight, capture)
    updated = updated + 1
  end
end
return { 'OK', updated }
