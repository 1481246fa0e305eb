-- Read one job.
--
-- moves   nothing
-- index   the primary keys
-- locks   nothing
-- caller  Job
select
    cast(jobs.id as text) as id, jobs.queue, jobs.task, jobs.state, jobs.run, jobs.attempt,
    jobs.created_at, jobs.due_at, jobs.started_at, jobs.ended_at,
    cast(jobs.result as text) as result, jobs.error_type, jobs.error,
    case when jobs.state = 'failed' then (
        select traceback
        from sqlqueue.run
        where run.job_id = jobs.id and run.run = jobs.run
        limit 1
    ) end as traceback
from sqlqueue.jobs
where jobs.id = cast(:job_id as uuid)
