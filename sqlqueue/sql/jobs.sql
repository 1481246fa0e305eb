-- Read jobs: those that have ended, others where :even_live says so; nulls for what is no job.
--
-- moves   nothing
-- index   ready_pkey, waiting_pkey, scheduled_pkey, lease_pkey, run_pkey, job_pkey
-- locks   nothing
-- caller  Job, Waits
select
    id, queue, task, state, run, attempt, created_at, due_at, started_at, ended_at, progress, note,
    result, error_type, error, traceback
from sqlqueue.job_states(cast(:job_ids as uuid[]), cast(:even_live as boolean[]))
