-- Ask that a job be cancelled, wherever it is and moves.
--
-- moves   nothing
-- index   the primary keys
-- locks   the row it adds
-- caller  Job.cancel, committed before it looks for the job: one that moves is not missed
insert into sqlqueue.cancel_request (job_id, reason)
select id, cast(:reason as text)
from sqlqueue.job
where id = cast(:job_id as uuid)
on conflict (job_id) do nothing
returning job_id
