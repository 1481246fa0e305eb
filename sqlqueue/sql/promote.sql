-- Make up to :batch jobs ready whose time has come; return how many in each lane.
--
-- moves   scheduled -> ready
-- index   scheduled_due
-- locks   the rows it takes; skips rows locked elsewhere, so it never waits
-- caller  upkeep
with due as (
    delete from sqlqueue.scheduled
    where ctid = any (array(
        select ctid
        from sqlqueue.scheduled
        where due_at <= now()
          and due_at > coalesce(now() - cast(:within as interval), '-infinity')  -- steps over dead
        order by due_at
        limit :batch
        for update skip locked
    ))
    returning job_id, due_at, run, failures, crashes, priority, queue
),
moved as (
    insert into sqlqueue.ready (job_id, due_at, run, failures, crashes, priority, queue)
    select job_id, due_at, run, failures, crashes, priority, queue
    from due
    order by due_at
)
select queue, priority, count(*) as moved, sqlqueue.ring(queue, cast(priority as text)) as silence
from due
group by queue, priority
