-- Exchange a task for its trajectory, unless another replica did.
-- KEYS tasks, trajectories, progress   ARGV entry id, batch, bytes
-- Returns 1 if it was exchanged. Safe to repeat: the task's entry exists once. Who holds the lease does not matter:
-- the first result counts. Not so that of another batch: its task was lost by Redis, and the number issued again.
local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not entry or batch_of(entry) ~= ARGV[2] then
  return 0
end
delete_task(KEYS[1], KEYS[3], ARGV[1])
redis.call('XADD', KEYS[2], '*', 'batch', ARGV[2], 'trajectory', ARGV[3], 'task', task_of(ARGV[1]))
return 1
