-- List what a worker holds, and whether somebody asked to cancel it.
--
-- moves   nothing
-- index   lease_worker
-- locks   nothing
-- caller  heartbeat, to compare with what the worker knows of
select
    cast(lease.job_id as text) as job_id,
    lease.run,
    exists (
        select from sqlqueue.cancel_request where cancel_request.job_id = lease.job_id
    ) as is_cancelled
from sqlqueue.lease
where worker_id = :worker
