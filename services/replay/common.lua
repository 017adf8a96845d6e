-- What every script shares. KEYS[1] is the prefix; all state of a table lives under it (see keys.py).
-- No script reads a clock: times arrive as arguments. Replies are arrays whose first entry is a word.
local prefix = KEYS[1]

local function key(name)
  return prefix .. ':' .. name
end

local function sample_key(capture)
  return key('sample:' .. capture)
end

local function uses_key(capture)
  return key('uses:' .. capture)
end

local function chunk_key(capture, attempt, index)
  return key('chunk:' .. capture .. ':' .. attempt .. ':' .. index)
end

local function table_is_lost()
  return redis.call('EXISTS', key('table')) == 0
end

-- Removes the chunks of a sample. Their keys follow from the number of chunks, so no scan is needed.
local function drop_chunks(capture)
  local fields = redis.call('HMGET', sample_key(capture), 'attempt', 'chunks')
  for index = 0, tonumber(fields[2]) - 1 do
    redis.call('UNLINK', chunk_key(capture, fields[1], index))
  end
end

-- Removes a sample, committed or being inserted, and gives its bytes back.
local function free(capture)
  local num_bytes = redis.call('HGET', sample_key(capture), 'bytes')
  drop_chunks(capture)
  redis.call('DEL', sample_key(capture), uses_key(capture))
  redis.call('ZREM', key('ready'), capture)
  redis.call('SREM', key('inserting'), capture)
  redis.call('HINCRBY', key('table'), 'resident', '-' .. num_bytes)
end

-- A lease is kept as "capture k generation rank".
local function parse_lease(text)
  return string.match(text, '^(%d+) (%d+) (%d+) (%d+)$')
end

local function end_lease(lease_id)
  redis.call('HDEL', key('leases'), lease_id)
  redis.call('ZREM', key('deadlines'), lease_id)
end

-- Ends a lease and puts its use back. A sample that was not ready takes its old place in the line.
local function return_use(lease_id)
  local capture, k = parse_lease(redis.call('HGET', key('leases'), lease_id))
  end_lease(lease_id)
  redis.call('ZADD', uses_key(capture), k, k)
  redis.call('ZADD', key('ready'), 'NX', redis.call('HGET', sample_key(capture), 'order'), capture)
  return capture
end

-- Returns a refusal unless there is a table and the generation is its current one.
local function check_generation(generation)
  local current = redis.call('HGET', key('table'), 'generation')
  if not current then
    return { 'LOST' }
  end
  if tonumber(generation) ~= tonumber(current) then
    return { 'STALE', current }
  end
  return nil
end

-- The same, and unless every lease id is known and named once.
local function check_leases(generation, first)
  local refusal = check_generation(generation)
  if refusal then
    return refusal
  end
  local seen = {}
  for position = first, #ARGV do
    local lease_id = ARGV[position]
    if seen[lease_id] or redis.call('HEXISTS', key('leases'), lease_id) == 0 then
      return { 'UNKNOWN', lease_id }
    end
    seen[lease_id] = true
  end
  return nil
end

-- An entry of the work queue is "attempt json": the number in front counts, whatever the json says.
local function attempt_of(entry)
  return tonumber(string.match(entry, '^%d+'))
end

local function with_attempt(entry, attempt)
  return (string.gsub(entry, '^%d+', string.format('%d', attempt), 1))
end

-- Ends a job of the work queue. Returns whether there was one.
local function forget_job(capture)
  redis.call('ZREM', key('work:taken'), capture)
  return redis.call('HDEL', key('work:jobs'), capture) == 1
end
