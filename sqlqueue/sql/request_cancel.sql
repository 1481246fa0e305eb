-- Ask that a job be cancelled, wherever it is and moves.
--
-- moves   nothing
-- index   the primary keys
-- locks   the row it adds
-- caller  Job.cancel, committed before it looks for the job: one that moves is not missed
insert into sqlqueue.cancel_request (job_id, reason)
select job_id, :reason
from (
    select job_id from sqlqueue.ready where job_id = cast(:job_id as uuid)
    union all
    select job_id from sqlqueue.scheduled where job_id = cast(:job_id as uuid)
    union all
    select job_id from sqlqueue.lease where job_id = cast(:job_id as uuid)
) as live
limit 1
on conflict (job_id) do nothing
