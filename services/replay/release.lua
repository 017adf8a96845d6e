-- release: generation, lease ids …
if table_is_lost() then
  return { 'LOST' }
end
local refusal = check_leases(ARGV[1], 2)
if refusal then
  return refusal
end
for position = 2, #ARGV do
  return_use(ARGV[position])
end
return { 'OK' }
