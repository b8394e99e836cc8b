-- Exchange a task for its trajectory, unless another replica did.
-- KEYS tasks, trajectories, progress   ARGV entry id, batch, bytes
-- Returns 1 if it was exchanged. Safe to repeat: the task's entry exists once. Who holds the lease does not matter:
-- the first result counts.
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call('XACK', KEYS[1], ROLLOUT, ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('XADD', KEYS[2], '*', 'batch', ARGV[2], 'trajectory', ARGV[3])
return 1
