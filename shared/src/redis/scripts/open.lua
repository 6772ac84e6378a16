-- The start of many attempts: takes over each job's log unless another attempt holds it that is not older.
--
-- KEYS: for each attempt the job's log and its cancellation.
-- ARGV: for each attempt its epoch, its header, and how long the log lives, in milliseconds.
-- Answers for each attempt {0, whether it is cancelled, records so far}, or {epoch that holds the log, 0, {}}.
--
-- A log is a list: epoch, header, records. The same attempt may open it again: it writes the same header.
local answers = {}
for i = 1, #KEYS / 2 do
  local log, cancellation = KEYS[2 * i - 1], KEYS[2 * i]
  local epoch, header, life = ARGV[3 * i - 2], ARGV[3 * i - 1], ARGV[3 * i]
  local held = redis.call('LRANGE', log, 0, 1)
  local by_epoch = tonumber(held[1] or 0)
  if by_epoch > tonumber(epoch) or (held[1] == epoch and held[2] ~= header) then
    answers[i] = { by_epoch, 0, {} }
  else
    if held[1] then
      redis.call('LSET', log, 0, epoch)
      redis.call('LSET', log, 1, header)
    else
      redis.call('RPUSH', log, epoch, header)
    end
    redis.call('PEXPIRE', log, life)
    answers[i] = { 0, redis.call('EXISTS', cancellation), redis.call('LRANGE', log, 2, -1) }
  end
end
return answers
