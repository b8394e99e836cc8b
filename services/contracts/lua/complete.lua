-- Exchange a task for its trajectory, unless another replica did.
-- KEYS tasks, trajectories, progress   ARGV entry id, batch, bytes
-- Returns 1 if it was exchanged. Safe to repeat: the task's entry exists once. Who holds the lease does not matter:
-- the first result counts.
if delete_task(KEYS[1], KEYS[3], ARGV[1]) == 0 then
  return 0
end
redis.call('XADD', KEYS[2], '*', 'batch', ARGV[2], 'trajectory', ARGV[3], 'task', task_of(ARGV[1]))
return 1
