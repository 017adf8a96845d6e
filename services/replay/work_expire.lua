-- expire: now
-- Overdue jobs return to the front of the queue, in plan order, each with its next attempt.
local reply = { 'OK' }
local overdue = redis.call('ZRANGEBYSCORE', key('work:taken'), '-inf', '(' .. ARGV[1])
table.sort(overdue, function(left, right) return tonumber(left) > tonumber(right) end)
for _, capture in ipairs(overdue) do
  redis.call('ZREM', key('work:taken'), capture)
  local entry = redis.call('HGET', key('work:jobs'), capture)
  if entry then
    redis.call('HSET', key('work:jobs'), capture, with_attempt(entry, attempt_of(entry) + 1))
    redis.call('LPUSH', key('work:queue'), capture)
    reply[#reply + 1] = capture
  end
end
return reply
