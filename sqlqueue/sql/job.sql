-- Read one job.
--
-- moves   nothing
-- index   the primary keys
-- locks   nothing
-- caller  Job
select
    cast(jobs.id as text) as id, jobs.queue, jobs.task, jobs.state, jobs.run, jobs.attempt,
    jobs.progress, jobs.note, jobs.created_at, jobs.due_at, jobs.started_at,
    jobs.ended_at, cast(jobs.result as text) as result, jobs.error_type, jobs.error, jobs.traceback
from sqlqueue.jobs
where jobs.id = cast(:job_id as uuid)
