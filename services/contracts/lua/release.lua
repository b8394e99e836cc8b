-- Give a claimed task back: its lease runs out now.   KEYS tasks, scanned   ARGV consumer, entry id
-- Returns 1 if the consumer held it. Safe to repeat: by then another may hold it, and keeps it.
local LONG_MS = 2147483647 -- older than any lease
if not is_owner(KEYS[1], ARGV[2], ARGV[1]) then
  return 0
end
redis.call('XCLAIM', KEYS[1], ROLLOUT, ARGV[1], 0, ARGV[2], 'IDLE', LONG_MS, 'JUSTID')
redis.call('DEL', KEYS[2]) -- so that the next claim looks for it
return 1
