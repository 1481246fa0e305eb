-- Read jobs: those that have ended, others where :even_live says so; nulls for what is no job.
--
-- moves   nothing
-- index   ready_pkey, waiting_pkey, scheduled_pkey, lease_pkey, run_pkey, job_pkey
-- locks   nothing
-- caller  Job, Waits
select
    cast(asked.id as text) as id, job.queue, job.task, job.state, job.run, job.attempt,
    job.created_at, job.due_at, job.started_at, job.ended_at, job.progress, job.note,
    cast(job.result as text) as result, job.error_type, job.error, job.traceback
from unnest(cast(:job_ids as uuid[]), cast(:even_live as boolean[])) as asked (id, even_live)
left join lateral (  -- a job that is found where it lives is looked for no further: no history
    select
        queue, task, state, run, attempt, created_at, due_at, started_at, ended_at, progress,
        note, result, error_type, error, traceback
    from sqlqueue.jobs
    where jobs.id = asked.id
    limit 1
) as job on true
where asked.even_live or job.state is null or job.ended_at is not null
