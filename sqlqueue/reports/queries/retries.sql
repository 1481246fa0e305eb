-- Jobs that wait for their next attempt, the next first.
select id, task, queue, attempt, attempts, due_at
from sqlqueue.live
where state = 'scheduled' and reason = 'retry'
order by due_at
limit 50
