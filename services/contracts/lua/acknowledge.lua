-- Forget what a durable checkpoint contains: trajectories, fates, the counts of its batches. Idle consumers too.
-- KEYS tasks, trajectories, live, settled, durable   ARGV version, number of entries, then entry ids, then task ids
-- Returns how many trajectories were deleted. Safe to repeat: all of it is deletion, but for a maximum.
local version, entries, deleted = tonumber(ARGV[1]), tonumber(ARGV[2]), 0
for i = 3, 2 + entries do
  deleted = deleted + delete_trajectory(KEYS[2], ARGV[i])
end
for i = 3 + entries, #ARGV do
  redis.call('HDEL', KEYS[4], ARGV[i])
end
for _, batch in ipairs(redis.call('HKEYS', KEYS[3])) do
  if tonumber(batch) < version then
    redis.call('HDEL', KEYS[3], batch)
  end
end
redis.call('SET', KEYS[5], math.max(version, number_at(KEYS[5])))
-- Every replica that ever was is a consumer. One that is back makes itself anew. (No consumers: a server just emptied.)
local IDLE_MS = 3600000
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ROLLOUT)
for _, fields in ipairs(consumers.err and {} or consumers) do
  local consumer = {}
  for i = 1, #fields, 2 do
    consumer[fields[i]] = fields[i + 1]
  end
  if consumer.pending == 0 and consumer.idle > IDLE_MS then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ROLLOUT, consumer.name)
  end
end
return deleted
