-- Lock some schedules that are to be fired, or have been changed; return them.
--
-- moves   nothing
-- index   schedule_next
-- locks   the rows it returns; skips rows locked elsewhere, so it never waits
-- caller  upkeep
select name, cron, every, tz, missed, next_at, now() as now
from sqlqueue.schedule
where (next_at <= now() or next_at is null)
  and (paused_at is null or resumes_at <= now())
order by next_at
limit 20
for update skip locked
