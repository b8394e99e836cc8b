-- Delete trajectories that a durable checkpoint contains, and forget the batches up to its own.
-- KEYS trajectories, live   ARGV through_batch, then entry ids
-- Returns how many were deleted. Safe to repeat: all of it is deletion.
local deleted = 0
for i = 2, #ARGV do
  redis.call('XACK', KEYS[1], LEARNER, ARGV[i])
  deleted = deleted + redis.call('XDEL', KEYS[1], ARGV[i])
end
for _, batch in ipairs(redis.call('HKEYS', KEYS[2])) do
  if tonumber(batch) <= tonumber(ARGV[1]) then
    redis.call('HDEL', KEYS[2], batch)
  end
end
return deleted
