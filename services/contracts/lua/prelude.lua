-- Put in front of every script. Streams hold entries of fields {batch, N, task | trajectory, bytes, ...}: the value of
-- the second field is [2][4] of an entry {id, {field, value, field, value, ...}}. A task's entry id is its number plus 1,
-- as stream ids begin at 1-0; a trajectory names its task in a third field.

local ROLLOUT = 'rollout' -- consumer group of `tasks`
local LEARNER = 'learner' -- consumer group of `trajectories`
local DEAD_LIMIT = 10000 -- dead letters kept, about
local RELEASED_MS = 2147483647 -- idle time of a task that was given back: older than any lease
local PAGE = 64 -- entries read at a time: trajectories are large

local function batch_of(entry)
  return entry[2][2]
end

local function payload_of(entry)
  return entry[2][4]
end

local function task_of(entry_id)
  return string.format('%d', tonumber(string.match(entry_id, '^%d+')) - 1)
end

local function task_of_trajectory(entry)
  return entry[2][6]
end

local function number_at(key)
  return tonumber(redis.call('GET', key) or '0')
end

-- Call `visit` with each entry of a stream, which may delete it.
local function each_entry(stream, visit)
  local from = '-'
  repeat
    local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', PAGE)
    for _, entry in ipairs(entries) do
      visit(entry)
      from = '(' .. entry[1]
    end
  until #entries < PAGE
end

-- One dialogue of the batch will not come. A batch that was acknowledged has no count any more: leave it so.
local function leave_batch(live, batch)
  if redis.call('HEXISTS', live, batch) == 1 then
    redis.call('HINCRBY', live, batch, -1)
  end
end

local function delete_task(tasks, progress, id)
  redis.call('XACK', tasks, ROLLOUT, id)
  redis.call('HDEL', progress, id)
  return redis.call('XDEL', tasks, id)
end

local function delete_trajectory(trajectories, id)
  redis.call('XACK', trajectories, LEARNER, id)
  return redis.call('XDEL', trajectories, id)
end

-- Move a task's entry to the dead letters. Does nothing, and returns 0, when the entry is gone.
local function bury(keys, id, reason)
  local entry = redis.call('XRANGE', keys.tasks, id, id)[1]
  if not entry then
    return 0
  end
  delete_task(keys.tasks, keys.progress, id)
  local fields = { 'reason', reason, 'task', payload_of(entry), 'id', task_of(id) }
  redis.call('XADD', keys.dead, 'MAXLEN', '~', DEAD_LIMIT, '*', unpack(fields))
  redis.call('HSET', keys.settled, task_of(id), 'dead letter')
  leave_batch(keys.live, batch_of(entry))
  return 1
end

-- How often the entry was delivered, if `consumer` holds its lease; else nil. What it gave back it no longer holds.
local function deliveries_to(consumer, tasks, id)
  local pending = redis.call('XPENDING', tasks, ROLLOUT, id, id, 1, consumer)[1]
  return pending and pending[3] < RELEASED_MS and pending[4] or nil
end
