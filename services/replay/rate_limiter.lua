-- The rate limiter of rate_limiter.py, on the counters of the table. An unbounded limit is stored as ''.

-- Whether the last admission that was refused for its bytes still would be.
local function is_full()
  local fields = redis.call('HMGET', key('table'), 'resident', 'wanted', 'capacity')
  return tonumber(fields[2]) > 0 and tonumber(fields[1]) + tonumber(fields[2]) > tonumber(fields[3])
end

local function promise_of(num_uses)
  return math.min(num_uses, tonumber(redis.call('HGET', key('table'), 'samples_per_insert')))
end

local function can_insert(promise)
  local fields = redis.call('HMGET', key('table'), 'inserts', 'deletes', 'min_size', 'promised', 'promising', 'taken',
    'max_diff')
  local size = tonumber(fields[1]) - tonumber(fields[2]) + redis.call('SCARD', key('inserting'))
  local difference = tonumber(fields[4]) + tonumber(fields[5]) - tonumber(fields[6])
  return size + 1 <= tonumber(fields[3]) or difference + promise <= (tonumber(fields[7]) or math.huge)
end

local function can_sample(num_uses)
  local fields = redis.call('HMGET', key('table'), 'inserts', 'deletes', 'min_size', 'promised', 'taken', 'min_diff')
  local size = tonumber(fields[1]) - tonumber(fields[2])
  local difference = tonumber(fields[4]) - tonumber(fields[5])
  return size >= tonumber(fields[3]) and difference - num_uses >= (tonumber(fields[6]) or -math.huge)
end

