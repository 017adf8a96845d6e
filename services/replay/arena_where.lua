-- arena_where: capture, attempt, 'place' or 'identity'
-- What tells this attempt's sample from any other that ever was or will be, and for 'place' the extents of its chunks.
local fields = redis.call('HMGET', sample_key(ARGV[1]), 'state', 'attempt', 'order')
if not fields[1] or tonumber(fields[2]) ~= tonumber(ARGV[2]) then
  return { 'GONE' }
end
local incarnation = redis.call('HGET', key('table'), 'incarnation')
local identity = fields[1] .. ' ' .. incarnation .. ' ' .. (fields[3] or '')
return { 'OK', identity, ARGV[3] == 'place' and extents_of(ARGV[1]) or nil }
