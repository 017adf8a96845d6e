-- The selectors of selectors.py: which ready sample the next use comes from. Draws in [0, 1) arrive as arguments.

local function format_number(number)
  return string.format('%.17g', number)
end

local function choose_fifo()
  return redis.call('ZRANGE', key('ready'), 0, 0)[1], '1'
end

local function choose_uniform(draw)
  local place = math.floor(draw * redis.call('ZCARD', key('ready')))
  return redis.call('ZRANGE', key('ready'), place, place)[1], '1'
end

-- The samples of the line by weight, read once a script: which has weight^1 / total as its probability.
local captures, weights

local function choose_prioritized(draw)
  if not captures then
    captures, weights = {}, {}
    local line = redis.call('ZRANGE', key('weights'), 0, -1, 'WITHSCORES')
    for position = 1, #line, 2 do
      captures[#captures + 1] = line[position]
      weights[#weights + 1] = tonumber(line[position + 1])
    end
  end
  local total = 0
  for place = 1, #weights do
    total = total + weights[place]
  end
  local place, passed = 1, weights[1]
  while place < #weights and draw * total >= passed do
    place = place + 1
    passed = passed + weights[place]
  end
  local beta = tonumber(redis.call('HGET', key('table'), 'importance_exponent'))
  return captures[place], format_number((weights[1] / weights[place]) ^ beta)
end

-- Tells the selector that a sample has left the line since it was read.
local function forget_choice(capture)
  for place = 1, #(captures or {}) do
    if captures[place] == capture then
      table.remove(captures, place)
      table.remove(weights, place)
      return
    end
  end
end

local choosers = { fifo = choose_fifo, uniform = choose_uniform, prioritized = choose_prioritized }

