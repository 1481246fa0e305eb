-- Say for how many seconds a job has waited for a worker that knows its task.
--
-- moves   nothing
-- index   run_pkey
-- locks   nothing
-- caller  Worker, for a job whose task it does not know
select cast(coalesce(extract(epoch from now() - min(ended_at)), 0) as double precision)
from sqlqueue.run
where job_id = cast(:job_id as uuid)
  and outcome = 'snoozed'
  and error_type = 'unknown_task'
