-- Adds events to the stream and publishes each on its channel, unless the entry that was added last is gone: then the stream was
-- lost, and must be filled again before anything new is added. One script, so that the loss cannot fall between look and deed.
--
-- KEYS[1]  the stream
-- ARGV[1]  id of the entry that was added last, or '' where it is not known
-- ARGV[2]  about how many entries to keep
-- ARGV[3]  and on: channel, event, type, evaluation_id, seq of each event
-- Returns the id of the entry added last, or false.
if ARGV[1] ~= '' and #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then
  return false
end
local last = ARGV[1]
for at = 3, #ARGV, 5 do
  local channel, event = ARGV[at], ARGV[at + 1]
  -- Trimming exactly would cost more than the entries that it saves.
  last = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*',
    'event', event, 'type', ARGV[at + 2], 'evaluation_id', ARGV[at + 3], 'seq', ARGV[at + 4])
  redis.call('PUBLISH', channel, event)
end
return last
