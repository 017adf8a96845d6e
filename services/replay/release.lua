-- release: generation, lease ids …
local refusal = check_leases(ARGV[1], 2)
if refusal then
  return refusal
end
for position = 2, #ARGV do
  return_use(ARGV[position])
end
return { 'OK' }
