-- One step of many jobs: records each job's frame in its log and publishes the frames, one message per channel.
--
-- KEYS: the jobs' logs, grouped by channel.
-- ARGV: for each channel its name, how many jobs follow, and how many of them, the first ones, may have no log yet; for
-- each job the writer's epoch and the record; for those that may have no log also its header and life in milliseconds.
-- Answers only what went wrong: {positions of superseded jobs}, {of missing logs}, {positions of unheard channels},
-- all counted from 0.
--
-- This runs for every token of the fleet: a log's first element is its epoch and nothing else, so that the check is
-- one comparison, and messages are joined as text, never parsed.
local call, keys, argv = redis.call, KEYS, ARGV
local superseded, missing, unheard = {}, {}, {}
local k, a, c = 1, 1, 0
while k <= #keys do
  local channel, count, unopened = argv[a], argv[a + 1], tonumber(argv[a + 2])
  a = a + 3
  local message, n = {}, 0
  for j = 1, count do
    local log, epoch, record = keys[k], argv[a], argv[a + 1]
    local held = call('LINDEX', log, 0)
    local by_another = false
    if j <= unopened then
      local header, life = argv[a + 2], argv[a + 3]
      a = a + 2
      if not held then
        call('RPUSH', log, epoch, header)
        call('PEXPIRE', log, life)
        held = epoch
      else
        by_another = held == epoch and call('LINDEX', log, 1) ~= header
      end
    end
    if by_another then
      superseded[#superseded + 1] = k - 1
    elseif held == epoch then
      call('RPUSH', log, record)
      n = n + 1
      message[n] = record
    elseif held and tonumber(held) > tonumber(epoch) then
      superseded[#superseded + 1] = k - 1
    else
      missing[#missing + 1] = k - 1
    end
    k, a = k + 1, a + 2
  end
  if n > 0 and call('PUBLISH', channel, '[' .. table.concat(message, ',') .. ']') == 0 then
    unheard[#unheard + 1] = c
  end
  c = c + 1
end
return { superseded, missing, unheard }
