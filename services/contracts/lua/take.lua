-- Hand out up to n trajectories: first the consumer's pending ones after the cursor, then new ones.
-- KEYS trajectories   ARGV consumer, cursor, n
-- Returns {id, bytes} of each. Safe to repeat: those of a lost reply are pending after the same cursor.
local taken = {}
local function read(from)
  local count = tonumber(ARGV[3]) - #taken
  if count <= 0 then
    return
  end
  local reply = redis.call('XREADGROUP', 'GROUP', LEARNER, ARGV[1], 'COUNT', count, 'STREAMS', KEYS[1], from)
  for _, entry in ipairs(reply and reply[1][2] or {}) do
    table.insert(taken, { entry[1], payload_of(entry) })
  end
end
read(ARGV[2])
read('>')
return taken
