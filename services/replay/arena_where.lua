-- arena_where: capture, attempt
-- What tells this attempt's sample from any other that ever was or will be, and the extents of its chunks.
local fields = redis.call('HMGET', sample_key(ARGV[1]), 'state', 'attempt', 'order')
if not fields[1] or tonumber(fields[2]) ~= tonumber(ARGV[2]) then
  return { 'GONE' }
end
local incarnation = redis.call('HGET', key('table'), 'incarnation')
return { 'OK', fields[1] .. ' ' .. incarnation .. ' ' .. (fields[3] or ''), extents_of(ARGV[1]) }
