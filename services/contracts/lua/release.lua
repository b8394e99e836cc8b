-- Give a claimed task back: its lease runs out now.   KEYS tasks, scanned   ARGV consumer, entry id, has_failed (0, 1)
-- Returns 1 if the consumer held it. Safe to repeat: the second time it no longer does.
local deliveries = deliveries_to(ARGV[1], KEYS[1], ARGV[2])
if not deliveries then
  return 0
end
if ARGV[3] == '0' then
  deliveries = math.max(0, deliveries - 1)
end
redis.call('XCLAIM', KEYS[1], ROLLOUT, ARGV[1], 0, ARGV[2], 'IDLE', RELEASED_MS, 'RETRYCOUNT', deliveries, 'JUSTID')
redis.call('DEL', KEYS[2]) -- so that the next claim looks for it
return 1
