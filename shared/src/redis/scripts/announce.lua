-- Renews a presence.
--
-- KEYS: the presence, the record of continuity; for a worker also the set of workers and the hash of known models.
-- ARGV: the presence's life in milliseconds, its content; for a worker also its id, then names and descriptions of models.
--
-- The record of continuity says since when presences have been renewed here without a pause. It lives exactly as long
-- as a presence does: whenever the service lost presences for reasons of its own (it came back empty, was away for
-- too long, was replaced by an empty replica), it lost this record too.
local life = ARGV[1]
redis.call('SET', KEYS[1], ARGV[2], 'PX', life)
if redis.call('PEXPIRE', KEYS[2], life) == 0 then
  local time = redis.call('TIME')
  redis.call('SET', KEYS[2], time[1] * 1000 + math.floor(time[2] / 1000), 'PX', life)
end
if KEYS[3] then
  redis.call('SADD', KEYS[3], ARGV[3])
  for i = 4, #ARGV, 2 do
    redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1])
  end
end
