-- lease: rank, generation, count, deadline, captures …
-- Without captures: `count` uses, oldest first, all or nothing until the table is sealed. With captures: exactly these.
local rank, generation, count, deadline = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local refusal = check_generation(generation)
if refusal then
  return refusal
end

local reply = { 'OK' }
-- An ack that outlives its table must not meet a lease of the table made anew.
local incarnation = redis.call('HGET', key('table'), 'incarnation')

local function take(capture)
  local k = redis.call('ZPOPMIN', uses_key(capture))[1]
  if redis.call('ZCARD', uses_key(capture)) == 0 then
    redis.call('ZREM', key('ready'), capture)
  else
    redis.call('ZADD', key('ready'), redis.call('HINCRBY', key('table'), 'order', 1), capture)
  end
  local lease_id = incarnation .. '.' .. redis.call('HINCRBY', key('table'), 'lease', 1)
  redis.call('HSET', key('leases'), lease_id, capture .. ' ' .. k .. ' ' .. generation .. ' ' .. rank)
  redis.call('ZADD', key('deadlines'), deadline, lease_id)
  redis.call('HINCRBY', key('table'), 'samples', 1)
  reply[#reply + 1] = lease_id
  reply[#reply + 1] = k
  reply[#reply + 1] = redis.call('HGET', sample_key(capture), 'record')
end

if #ARGV > 4 then
  local wanted = {}
  for position = 5, #ARGV do
    local capture = ARGV[position]
    wanted[capture] = (wanted[capture] or 0) + 1
    if redis.call('ZCARD', uses_key(capture)) < wanted[capture] then
      return reply
    end
  end
  for position = 5, #ARGV do
    take(ARGV[position])
  end
  return reply
end

local available = 0
for _, capture in ipairs(redis.call('ZRANGE', key('ready'), 0, count - 1)) do
  available = available + redis.call('ZCARD', uses_key(capture))
end
if available < count and redis.call('HGET', key('table'), 'sealed') == '0' then
  return reply
end
for _ = 1, math.min(count, available) do
  take(redis.call('ZRANGE', key('ready'), 0, 0)[1])
end
return reply
