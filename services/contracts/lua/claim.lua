-- Lease up to n tasks to a consumer: first those whose lease ran out, then new ones.
-- KEYS tasks, dead, live, progress, settled, version_floor, scanned
-- ARGV consumer, version, n, lease_ms, max_deliveries
-- Returns {id, deliveries, bytes, progress or nil} of each.
-- Repeating it leases more tasks; those of a lost reply run out and come back.
local keys = { tasks = KEYS[1], dead = KEYS[2], live = KEYS[3], progress = KEYS[4], settled = KEYS[5] }
local tasks, consumer, n, lease_ms = keys.tasks, ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
if tonumber(ARGV[2]) < number_at(KEYS[6]) then
  return {}
end
local claimed = {}
-- Finding the idle entries reads through all that are pending, so only one claim in a quarter of a lease does it.
if redis.call('SET', KEYS[7], '1', 'NX', 'PX', math.max(1, math.floor(lease_ms / 4))) then
  local expired = redis.call('XPENDING', tasks, ROLLOUT, 'IDLE', lease_ms, '-', '+', n)
  for _, pending in ipairs(expired) do
    local id, deliveries = pending[1], pending[4]
    if deliveries >= tonumber(ARGV[5]) then
      bury(keys, id, 'deliveries')
    else
      local entry = redis.call('XCLAIM', tasks, ROLLOUT, consumer, 0, id)[1]
      if entry then
        table.insert(claimed, { id, deliveries + 1, payload_of(entry), redis.call('HGET', keys.progress, id) })
      end
    end
  end
  if #expired == n then
    redis.call('DEL', KEYS[7]) -- there may be more
  end
end
if #claimed < n then
  local reply = redis.call('XREADGROUP', 'GROUP', ROLLOUT, consumer, 'COUNT', n - #claimed, 'STREAMS', tasks, '>')
  for _, entry in ipairs(reply and reply[1][2] or {}) do
    table.insert(claimed, { entry[1], 1, payload_of(entry), false })
  end
end
return claimed
