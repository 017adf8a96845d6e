-- live: earliest
-- The targets that were seen since then and are not quarantined.
local reply = { 'OK' }
for _, address in ipairs(redis.call('ZRANGEBYSCORE', key('targets'), ARGV[1], '+inf')) do
  if redis.call('HEXISTS', key('quarantined'), address) == 0 then
    reply[#reply + 1] = address
  end
end
return reply
