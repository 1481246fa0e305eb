-- Cancel a job that is scheduled; return a row if it was.
--
-- moves   scheduled -> run
-- index   scheduled_pkey
-- locks   the row it takes; waits for a promotion of it to commit
-- caller  Job.cancel
with gone as (
    delete from sqlqueue.scheduled
    where job_id = cast(:job_id as uuid)
    returning job_id, due_at, run, failures, crashes
)
insert into sqlqueue.run (
    job_id, run, ended_at, due_at, attempt, crashes, is_final, outcome, error_type, error
)
select
    job_id, run + 1, now(), due_at, failures + 1, crashes, true, 'cancelled', 'cancelled',
    cast(:reason as text)
from gone
returning run
