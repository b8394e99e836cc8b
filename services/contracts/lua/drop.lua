-- Throw taken trajectories away; their batches then lack them.
-- KEYS trajectories, live, settled   ARGV reason, then entry ids
-- Returns how many there were. Safe to repeat: an entry is deleted once.
local dropped = 0
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    delete_trajectory(KEYS[1], ARGV[i])
    redis.call('HSET', KEYS[3], task_of_trajectory(entry), ARGV[1])
    leave_batch(KEYS[2], batch_of(entry))
    dropped = dropped + 1
  end
end
return dropped
