-- The presences of all workers; forgets those that have expired.
--
-- KEYS: the set of workers. ARGV: what the names of their presences start with.
local there = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local presence = redis.call('GET', ARGV[1] .. id)
  if presence then
    there[#there + 1] = presence
  else
    redis.call('SREM', KEYS[1], id)
  end
end
return there
