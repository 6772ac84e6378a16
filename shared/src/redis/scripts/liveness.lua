-- Whether a process is there.
--
-- KEYS: its presence, the record of continuity (see announce.lua). ARGV: a presence's life in milliseconds; for a
-- worker also its control channel.
-- Answers whether its presence is fresh, how many listen to its control channel, and whether presences have been
-- renewed here for less than such a life.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local since = tonumber(redis.call('GET', KEYS[2]) or now)
if since >= now then -- It is lost, or another server's clock wrote it.
  since = now
  redis.call('SET', KEYS[2], since, 'PX', ARGV[1])
else
  redis.call('PEXPIRE', KEYS[2], ARGV[1])
end
local listeners = 0
if ARGV[2] then
  listeners = redis.call('PUBSUB', 'NUMSUB', ARGV[2])[2]
end
return { redis.call('EXISTS', KEYS[1]), listeners, now - since < tonumber(ARGV[1]) and 1 or 0 }
