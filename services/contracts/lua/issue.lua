-- Append tasks and move the issue counter, if the counter is where the learner believes it to be.
-- KEYS next_task, tasks, live, version_floor   ARGV expected_next, then (batch, min_version, bytes) of each task
-- Returns the counter. Safe to repeat: the second time the counter is no longer `expected_next`.
local next_task = number_at(KEYS[1])
if next_task ~= tonumber(ARGV[1]) then
  return next_task
end
local floor, first_batch = number_at(KEYS[4]), math.huge
for i = 2, #ARGV, 3 do
  next_task = next_task + 1 -- stream ids start at 1-0, task ids at 0
  redis.call('XADD', KEYS[2], next_task .. '-0', 'batch', ARGV[i], 'task', ARGV[i + 2])
  redis.call('HINCRBY', KEYS[3], ARGV[i], 1)
  floor = math.max(floor, tonumber(ARGV[i + 1]))
  first_batch = math.min(first_batch, tonumber(ARGV[i]))
end
-- No weights are newer than the batch being made, so a higher floor is of a run set back since to an old checkpoint.
floor = math.min(floor, first_batch)
redis.call('SET', KEYS[1], next_task)
redis.call('SET', KEYS[4], floor)
return next_task
