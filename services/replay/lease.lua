-- lease: rank, generation, count, deadline, then 'named' and captures …, or 'drawn' and one draw in [0, 1) a use …
-- Named: exactly these captures, all or nothing; the rate limiter is not asked, whoever names them knows the plan.
-- Drawn: as many uses as `count`, all or nothing until no more will come.
local rank, generation, num_wanted, deadline = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local refusal = check_generation(generation)
if refusal then
  return refusal
end

local reply = { 'OK' }
-- An ack that outlives its table must not meet a lease of the table made anew.
local incarnation = redis.call('HGET', key('table'), 'incarnation')

local function take(capture, importance)
  local k = redis.call('ZPOPMIN', uses_key(capture))[1]
  leave_line(capture)
  if redis.call('ZCARD', uses_key(capture)) > 0 then
    enter_line(capture, count('order', 1))
  else
    forget_choice(capture)
  end
  local lease_id = incarnation .. '.' .. count('lease', 1)
  redis.call('HSET', key('leases'), lease_id, capture .. ' ' .. k .. ' ' .. generation .. ' ' .. rank)
  redis.call('ZADD', key('deadlines'), deadline, lease_id)
  count('samples', 1)
  count('taken', 1)
  reply[#reply + 1] = lease_id
  reply[#reply + 1] = k
  reply[#reply + 1] = redis.call('HGET', sample_key(capture), 'record')
  reply[#reply + 1] = importance
end

if ARGV[5] == 'named' then
  local wanted = {}
  for position = 6, #ARGV do
    local capture = ARGV[position]
    wanted[capture] = (wanted[capture] or 0) + 1
    if redis.call('ZCARD', uses_key(capture)) < wanted[capture] then
      return reply
    end
  end
  for position = 6, #ARGV do
    take(ARGV[position], '1')
  end
  return reply
end

local fields = redis.call('HMGET', key('table'), 'sealed', 'uses', 'taken', 'largest_lease', 'selector')
local available = tonumber(fields[2]) - tonumber(fields[3])
local is_sealed, full = fields[1] == '1', is_full()
if not is_sealed then
  if num_wanted > (tonumber(fields[4]) or math.huge) then
    return { 'COUNT', fields[4] }
  end
  -- Full, nothing leased, nothing on its way: no ack will ever make room for the rest.
  local is_stuck = full and redis.call('HLEN', key('leases')) + redis.call('SCARD', key('inserting')) == 0
  if available < num_wanted and not is_stuck then
    return reply
  end
  if not full and not can_sample(num_wanted) then
    return reply
  end
end
local choose = choosers[fields[5]]
for number = 1, math.min(num_wanted, available) do
  take(choose(tonumber(ARGV[5 + number])))
end
return reply
