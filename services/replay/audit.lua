-- audit: pattern of all keys under the prefix
-- Everything that the counters of a table count, at one moment. Changes nothing.
local reply = { table = redis.call('HGETALL', key('table')), samples = {}, chunks = {}, uses = {} }
local function after(name, word)
  local start = prefix .. ':' .. word .. ':'
  return string.sub(name, 1, #start) == start and string.sub(name, #start + 1) or nil
end
for _, name in ipairs(redis.call('KEYS', ARGV[1])) do
  local sample, chunk, uses = after(name, 'sample'), after(name, 'chunk'), after(name, 'uses')
  if sample then
    reply.samples[#reply.samples + 1] = { sample, redis.call('HMGET', name, 'state', 'attempt', 'bytes', 'chunks',
      'stored', 'num_uses', 'unacked', 'promise'), extents_of(sample) }
  elseif chunk then
    reply.chunks[#reply.chunks + 1] = { chunk, redis.call('STRLEN', name) }
  elseif uses then
    reply.uses[#reply.uses + 1] = { uses, redis.call('ZRANGE', name, 0, -1) }
  end
end
reply.freed = redis.call('LRANGE', key('freed'), 0, -1)
reply.inserting = redis.call('SMEMBERS', key('inserting'))
reply.ready = redis.call('ZRANGE', key('ready'), 0, -1)
reply.weights = redis.call('ZRANGE', key('weights'), 0, -1)
reply.leases = redis.call('HGETALL', key('leases'))
reply.deadlines = redis.call('ZRANGE', key('deadlines'), 0, -1)
reply.queue = redis.call('LRANGE', key('work:queue'), 0, -1)
reply.taken = redis.call('ZRANGE', key('work:taken'), 0, -1)
reply.jobs = {}
for _, capture in ipairs(redis.call('HKEYS', key('work:jobs'))) do
  reply.jobs[#reply.jobs + 1] = { capture, attempt_of(redis.call('HGET', key('work:jobs'), capture)) }
end
return { 'OK', cjson.encode(reply) }
