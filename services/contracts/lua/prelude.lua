-- Put in front of every script. Streams hold entries of fields {batch, N, task | trajectory, bytes}: the value of the
-- second field is [2][4] of an entry {id, {field, value, field, value}}.

local ROLLOUT = 'rollout' -- consumer group of `tasks`
local LEARNER = 'learner' -- consumer group of `trajectories`
local DEAD_LIMIT = 10000 -- dead letters kept, about
local RELEASED_MS = 2147483647 -- idle time of a task that was given back: older than any lease

local function batch_of(entry)
  return entry[2][2]
end

local function payload_of(entry)
  return entry[2][4]
end

local function number_at(key)
  return tonumber(redis.call('GET', key) or '0')
end

-- One dialogue of the batch will not come. A batch that was acknowledged has no count any more: leave it so.
local function leave_batch(live, batch)
  if redis.call('HEXISTS', live, batch) == 1 then
    redis.call('HINCRBY', live, batch, -1)
  end
end

-- Move a task's entry to the dead letters. Does nothing, and returns 0, when the entry is gone.
local function bury(tasks, dead, live, progress, id, reason)
  local entry = redis.call('XRANGE', tasks, id, id)[1]
  if not entry then
    return 0
  end
  redis.call('XACK', tasks, ROLLOUT, id)
  redis.call('XDEL', tasks, id)
  redis.call('HDEL', progress, id)
  redis.call('XADD', dead, 'MAXLEN', '~', DEAD_LIMIT, '*', 'reason', reason, 'task', payload_of(entry))
  leave_batch(live, batch_of(entry))
  return 1
end

-- How often the entry was delivered, if `consumer` holds its lease; else nil. What it gave back it no longer holds.
local function deliveries_to(consumer, tasks, id)
  local pending = redis.call('XPENDING', tasks, ROLLOUT, id, id, 1, consumer)[1]
  return pending and pending[3] < RELEASED_MS and pending[4] or nil
end
