-- Bring a ledger that lost writes, or was left by a learner that died, in line with the learner's books.
-- KEYS tasks, trajectories, live, progress, settled, next_task, durable, server
-- ARGV issue counter, version, the server's run id, number of tasks to forget, those, (task, fate) of each that is gone
-- Deletes what the books have settled, records what is gone, and counts the batches anew. Returns nothing.
-- Safe to repeat: all of it is setting and deleting.
local num_forgotten = tonumber(ARGV[4])
local forgotten, live = {}, {}
for i = 5, 4 + num_forgotten do
  forgotten[ARGV[i]] = true
  redis.call('HDEL', KEYS[5], ARGV[i])
end
for i = 5 + num_forgotten, #ARGV, 2 do
  redis.call('HSET', KEYS[5], ARGV[i], ARGV[i + 1])
end
each_entry(KEYS[1], function(entry)
  if forgotten[task_of(entry[1])] then
    delete_task(KEYS[1], KEYS[4], entry[1])
  else
    live[batch_of(entry)] = (live[batch_of(entry)] or 0) + 1
  end
end)
each_entry(KEYS[2], function(entry)
  if forgotten[task_of_trajectory(entry)] then
    delete_trajectory(KEYS[2], entry[1])
  else
    live[batch_of(entry)] = (live[batch_of(entry)] or 0) + 1
  end
end)
redis.call('DEL', KEYS[3])
for batch, count in pairs(live) do
  redis.call('HSET', KEYS[3], batch, count)
end
redis.call('SET', KEYS[6], math.max(number_at(KEYS[6]), tonumber(ARGV[1])))
redis.call('SET', KEYS[7], ARGV[2])
redis.call('SET', KEYS[8], ARGV[3])
