-- Say how long it is until the next job is due, if that is soon.
--
-- moves   nothing
-- index   scheduled_due
-- locks   nothing
-- caller  upkeep
select due_at - now() as wait
from sqlqueue.scheduled
where due_at > now()
  and due_at < now() + interval '1 day'
order by due_at
limit 1
