-- All that the ledger knows, after taking back the tasks of closed batches: nobody will train on them.
-- KEYS tasks, trajectories, dead, live, progress, settled, next_task, durable
-- ARGV first open batch (tasks of the ones before are settled as spare)
-- Returns {next_task, durable, {task, batch, is_running, ...}, {entry, task, batch, ...}, {task, fate, ...}, {task, ...}}.
-- Safe to repeat: a task is taken back once. With 0 it only reads.
local first_open = tonumber(ARGV[1])
local running, tasks, trajectories, dead = {}, {}, {}, {}
local summary = redis.pcall('XPENDING', KEYS[1], ROLLOUT)
if not summary.err and summary[1] > 0 then
  for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ROLLOUT, '-', '+', summary[1])) do
    running[pending[1]] = true
  end
end
each_entry(KEYS[1], function(entry)
  local id, batch = entry[1], batch_of(entry)
  if tonumber(batch) < first_open then
    delete_task(KEYS[1], KEYS[5], id)
    redis.call('HSET', KEYS[6], task_of(id), 'spare')
    leave_batch(KEYS[4], batch)
  else
    table.insert(tasks, task_of(id))
    table.insert(tasks, batch)
    table.insert(tasks, running[id] and 1 or 0)
  end
end)
each_entry(KEYS[2], function(entry)
  table.insert(trajectories, entry[1])
  table.insert(trajectories, task_of_trajectory(entry))
  table.insert(trajectories, batch_of(entry))
end)
each_entry(KEYS[3], function(entry)
  table.insert(dead, entry[2][6])
end)
local counters = { number_at(KEYS[7]), number_at(KEYS[8]) }
return { counters[1], counters[2], tasks, trajectories, redis.call('HGETALL', KEYS[6]), dead }
