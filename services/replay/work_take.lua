-- take: deadline
while true do
  local capture = redis.call('LPOP', key('work:queue'))
  if not capture then
    return { 'EMPTY' }
  end
  local entry = redis.call('HGET', key('work:jobs'), capture)
  if entry and not redis.call('ZSCORE', key('work:taken'), capture) then
    redis.call('ZADD', key('work:taken'), ARGV[1], capture)
    return { 'OK', entry }
  end
end
