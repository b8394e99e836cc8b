-- Move a task to the dead letters.   KEYS tasks, dead, live   ARGV entry id, reason
-- Returns 1 if it was moved. Safe to repeat: the task's entry exists once.
return bury(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2])
