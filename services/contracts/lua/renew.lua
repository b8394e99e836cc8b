-- Start the leases of a consumer's tasks anew.   KEYS tasks   ARGV consumer, then entry ids
-- Returns the ids that are still its own. Safe to repeat: it sets the idle time to 0.
local ours = {}
for i = 2, #ARGV do
  if deliveries_to(ARGV[1], KEYS[1], ARGV[i]) then
    redis.call('XCLAIM', KEYS[1], ROLLOUT, ARGV[1], 0, ARGV[i], 'JUSTID') -- JUSTID: not counted as a delivery
    table.insert(ours, ARGV[i])
  end
end
return ours
