-- ack: generation, now, lease ids …
-- All or nothing. The ack of a sample's last use frees its bytes.
local refusal = check_leases(ARGV[1], 3)
if refusal then
  return refusal
end
for position = 3, #ARGV do
  local deadline = redis.call('ZSCORE', key('deadlines'), ARGV[position])
  if tonumber(ARGV[2]) > tonumber(deadline) then
    return { 'OVERDUE', ARGV[position], deadline }
  end
end
for position = 3, #ARGV do
  local capture = parse_lease(redis.call('HGET', key('leases'), ARGV[position]))
  end_lease(ARGV[position])
  if redis.call('HINCRBY', sample_key(capture), 'unacked', -1) == 0 then
    free_resident(capture)
  end
end
return { 'OK' }
