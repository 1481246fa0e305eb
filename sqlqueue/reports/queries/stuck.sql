-- Jobs that have been running for more than ten minutes, the longest first.
select id, task, queue, worker_id, started_at, ran, timeout
from sqlqueue.live
where state = 'running' and ran > interval '10 minutes'
order by ran desc
limit 50
