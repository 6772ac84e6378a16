-- Leaves a cancellation, then tells all workers.
--
-- KEYS: the job's cancellation, the list of all cancellations (by when they expire).
-- ARGV: the job's key, the cancellation's life in milliseconds, the control channel, the word to publish.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[1], '1', 'PX', ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], ARGV[4])
