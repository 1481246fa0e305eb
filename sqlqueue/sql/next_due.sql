-- Say how long it is until the next job is due.
--
-- moves   nothing
-- index   scheduled_due
-- locks   nothing
-- caller  upkeep
select due_at - now() as wait
from sqlqueue.scheduled
where due_at > now()
order by due_at
limit 1
