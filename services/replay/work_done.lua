-- done: capture
if forget_job(ARGV[1]) then
  return { 'OK' }
end
return { 'UNKNOWN' }
