-- Move a task to the dead letters.   KEYS tasks, dead, live, progress   ARGV entry id, reason
-- Returns 1 if it was moved. Safe to repeat: the task's entry exists once.
return bury(KEYS[1], KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
