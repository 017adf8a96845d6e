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

-- Sets every counter to that of a table without samples.
local function empty_table()
  redis.call('HSET', key('table'), 'resident', 0, 'peak', 0, 'wanted', 0, 'sealed', 0, 'order', 0, 'lease', 0,
    'inserts', 0, 'samples', 0, 'deletes', 0, 'uses', 0, 'taken', 0, 'promised', 0, 'promising', 0)
end

local function table_is_lost()
  return redis.call('EXISTS', key('table')) == 0
end

-- One field of every chunk of a sample; false where it is missing. Asked for in groups: Lua's stack has a limit.
local function fields_of_chunks(capture, name, num_chunks)
  local group = 1000
  local values = {}
  for first = 0, num_chunks - 1, group do
    local names = {}
    for index = first, math.min(first + group, num_chunks) - 1 do
      names[#names + 1] = name .. ':' .. index
    end
    for _, value in ipairs(redis.call('HMGET', sample_key(capture), unpack(names))) do
      values[#values + 1] = value
    end
  end
  return values
end

-- Where the chunks of a sample lie in the arena, each followed by ';'; empty if they are in Redis.
local function extents_of(capture)
  local fields = redis.call('HMGET', sample_key(capture), 'extents', 'chunks')
  if fields[1] then
    return fields[1]
  end
  local found = fields_of_chunks(capture, 'at', tonumber(fields[2]))
  if not found[1] then
    return ''
  end
  return table.concat(found, ';') .. ';'
end

-- Removes the chunks of a sample. Their keys follow from the number of chunks, so no scan is needed. Space in an arena
-- is noted for its writer, which alone gives it away again.
local function drop_chunks(capture)
  local extents = extents_of(capture)
  if extents ~= '' then
    redis.call('RPUSH', key('freed'), extents)
    return
  end
  local fields = redis.call('HMGET', sample_key(capture), 'attempt', 'chunks')
  for index = 0, tonumber(fields[2]) - 1 do
    redis.call('UNLINK', chunk_key(capture, fields[1], index))
  end
end

-- What an attempt that is being inserted has stored so far; or nil and a refusal.
local function stored_by(capture, attempt)
  local fields = redis.call('HMGET', sample_key(capture), 'state', 'attempt', 'bytes', 'chunks', 'stored')
  if fields[1] ~= 'inserting' or tonumber(fields[2]) ~= tonumber(attempt) then
    return nil, { 'STALE', fields[1] or 'gone', fields[2] or '' }
  end
  return {
    attempt = fields[2],
    reserved = tonumber(fields[3]),
    num_chunks = tonumber(fields[4]),
    num_bytes = tonumber(fields[5]),
  }
end

-- Counts one more chunk in it. Returns a refusal, or nil.
local function add_chunk(stored, capture, index, num_bytes)
  if index > stored.num_chunks then
    return { 'GAP', index, stored.num_chunks }
  end
  if index < stored.num_chunks then
    stored.num_bytes = stored.num_bytes - tonumber(redis.call('HGET', sample_key(capture), 'size:' .. index))
  end
  stored.num_bytes = stored.num_bytes + num_bytes
  if stored.num_bytes > stored.reserved then
    return { 'OVERFLOW', index, stored.num_bytes, stored.reserved }
  end
  stored.num_chunks = math.max(stored.num_chunks, index + 1)
  return nil
end

local function count(name, number)
  return redis.call('HINCRBY', key('table'), name, string.format('%d', number))
end

-- Puts a sample in the line that leases are taken from, unless it is there; a lower place is taken earlier by fifo.
local function enter_line(capture, place)
  redis.call('ZADD', key('ready'), 'NX', place, capture)
  redis.call('ZADD', key('weights'), redis.call('HGET', sample_key(capture), 'weight'), capture)
end

local function leave_line(capture)
  redis.call('ZREM', key('ready'), capture)
  redis.call('ZREM', key('weights'), capture)
end

-- Removes a capture that is being inserted, and gives its bytes back.
local function free_inserting(capture)
  local fields = redis.call('HMGET', sample_key(capture), 'bytes', 'promise')
  drop_chunks(capture)
  redis.call('DEL', sample_key(capture))
  redis.call('SREM', key('inserting'), capture)
  count('resident', -tonumber(fields[1]))
  count('promising', -tonumber(fields[2]))
end

-- Removes a committed sample, and gives its bytes back.
local function free_resident(capture)
  local fields = redis.call('HMGET', sample_key(capture), 'bytes', 'promise', 'num_uses')
  local num_uses = tonumber(fields[3])
  count('resident', -tonumber(fields[1]))
  count('promised', -tonumber(fields[2]))
  count('uses', -num_uses)
  count('taken', redis.call('ZCARD', uses_key(capture)) - num_uses)
  count('deletes', 1)
  drop_chunks(capture)
  leave_line(capture)
  redis.call('DEL', sample_key(capture), uses_key(capture))
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
  count('taken', -1)
  enter_line(capture, redis.call('HGET', sample_key(capture), 'order'))
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
