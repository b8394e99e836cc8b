-- Keep a dialogue's progress, and start its lease anew.   KEYS tasks, progress   ARGV consumer, entry id, bytes
-- Returns 1 if the consumer held it. Safe to repeat: it sets. Something came of this delivery, so that the earlier
-- ones no longer count: a task that died with its replicas, but each time one attempt further, is no poison.
if not deliveries_to(ARGV[1], KEYS[1], ARGV[2]) then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('XCLAIM', KEYS[1], ROLLOUT, ARGV[1], 0, ARGV[2], 'RETRYCOUNT', 1, 'JUSTID')
return 1
