-- Move the issue counter forward to the learner's own.   KEYS next_task   ARGV counter
-- Returns the counter. Safe to repeat: a maximum.
local next_task = math.max(number_at(KEYS[1]), tonumber(ARGV[1]))
redis.call('SET', KEYS[1], next_task)
return next_task
