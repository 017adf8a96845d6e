-- quarantine: address, reason
if not redis.call('ZSCORE', key('targets'), ARGV[1]) then
  return { 'UNKNOWN' }
end
if redis.call('HSETNX', key('quarantined'), ARGV[1], ARGV[2]) == 0 then
  return { 'KNOWN' }
end
return { 'OK' }
