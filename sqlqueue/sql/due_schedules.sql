-- Lock some schedules that are to be fired, or have been changed; return them.
--
-- moves   nothing
-- index   schedule_next
-- locks   the rows it returns; skips rows locked elsewhere, so it never waits
-- caller  upkeep
select name, cron, every, tz, missed, next_at, now
from sqlqueue.due_schedules()
