-- Move a task to the dead letters.   KEYS tasks, dead, live, progress, settled   ARGV entry id, reason
-- Returns 1 if it was moved. Safe to repeat: the task's entry exists once.
local keys = { tasks = KEYS[1], dead = KEYS[2], live = KEYS[3], progress = KEYS[4], settled = KEYS[5] }
return bury(keys, ARGV[1], ARGV[2])
