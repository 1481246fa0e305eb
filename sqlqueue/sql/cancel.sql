-- Cancel a job that is scheduled or ready; return a row if it was.
--
-- moves   scheduled -> run, ready -> run
-- index   ready_pkey, scheduled_pkey
-- locks   the row it takes; waits for a promotion or a claim of it to commit
-- caller  Job.cancel, twice: a job that moves while it looks is met the second time
with was_scheduled as (
    delete from sqlqueue.scheduled
    where job_id = cast(:job_id as uuid)
    returning job_id, due_at, run, failures, crashes
),
was_ready as (
    delete from sqlqueue.ready
    where job_id = cast(:job_id as uuid)
    returning job_id, due_at, run, failures, crashes
)
insert into sqlqueue.run (
    job_id, run, ended_at, due_at, attempt, crashes, is_final, outcome, error_type, error
)
select
    job_id, run + 1, now(), due_at, failures + 1, crashes, true, 'cancelled', 'cancelled',
    cast(:reason as text)
from (
    select job_id, due_at, run, failures, crashes from was_scheduled
    union all
    select job_id, due_at, run, failures, crashes from was_ready
) as gone
returning run
