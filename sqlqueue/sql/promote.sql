-- Make up to :batch jobs ready whose time has come; return how many in each lane.
--
-- moves   scheduled -> ready, scheduled -> run
-- index   scheduled_due
-- locks   the rows it takes; skips rows locked elsewhere, so it never waits
-- caller  upkeep
--
-- A job that somebody asked to cancel ends here.
with due as materialized (
    select
        ctid as place, job_id, due_at, run, failures, crashes, priority, queue,
        (
            select cancel_request.reason
            from sqlqueue.cancel_request
            where cancel_request.job_id = scheduled.job_id
        ) as cancelled  -- null: nobody asked for it
    from sqlqueue.scheduled
    where due_at <= now()
      and due_at > coalesce(now() - cast(:within as interval), '-infinity')  -- steps over dead rows
    order by due_at
    limit :batch
    for update of scheduled skip locked
),
gone as (
    delete from sqlqueue.scheduled
    where ctid = any (array(select place from due))
),
moved as (
    insert into sqlqueue.ready (job_id, due_at, run, failures, crashes, priority, queue)
    select job_id, due_at, run, failures, crashes, priority, queue
    from due
    where cancelled is null
),
ended as (
    insert into sqlqueue.run (
        job_id, run, ended_at, due_at, attempt, crashes, is_final, outcome, error_type, error
    )
    select
        job_id, run + 1, now(), due_at, failures + 1, crashes, true, 'cancelled', 'cancelled',
        cancelled
    from due
    where cancelled is not null
),
lanes as (
    select queue, priority, count(*) as moved
    from due
    where cancelled is null
    group by queue, priority
)
select queue, priority, moved, sqlqueue.ring(queue, cast(priority as text)) as silence
from lanes
