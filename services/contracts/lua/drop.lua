-- Throw taken trajectories away; their batches then lack them.   KEYS trajectories, live   ARGV entry ids
-- Returns how many there were. Safe to repeat: an entry is deleted once.
local dropped = 0
for _, id in ipairs(ARGV) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    redis.call('XACK', KEYS[1], LEARNER, id)
    redis.call('XDEL', KEYS[1], id)
    leave_batch(KEYS[2], batch_of(entry))
    dropped = dropped + 1
  end
end
return dropped
