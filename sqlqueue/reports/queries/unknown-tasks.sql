-- Tasks of unended jobs that no live worker knows.
select live.task, live.queue, count(*) as jobs, min(live.created_at) as since
from sqlqueue.live
where not exists (
    select
    from sqlqueue.workers
    where liveness <> 'dead' and live.task = any (workers.tasks)
)
group by live.task, live.queue
order by jobs desc
