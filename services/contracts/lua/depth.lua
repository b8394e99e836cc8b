-- Count what is where.   KEYS tasks, trajectories, dead
-- Returns tasks waiting, tasks leased, trajectories ready, trajectories taken, dead letters. Reads only.
local running = redis.call('XPENDING', KEYS[1], ROLLOUT)[1]
local taken = redis.call('XPENDING', KEYS[2], LEARNER)[1]
return {
  redis.call('XLEN', KEYS[1]) - running,
  running,
  redis.call('XLEN', KEYS[2]) - taken,
  taken,
  redis.call('XLEN', KEYS[3]),
}
