-- Schedules that should have been fired over a minute ago, or cannot be.
select name, task, cron, every, next_at, last_at, problem
from sqlqueue.schedules
where is_enabled and (next_at < now() - interval '1 minute' or problem is not null)
order by next_at
