-- List what a worker holds that it claimed :within now, and all that somebody asked to cancel.
--
-- moves   nothing
-- index   lease_worker
-- locks   nothing
-- caller  heartbeat, to compare with what the worker knows of
select job_id, run, is_cancelled
from sqlqueue.leases(:worker, cast(:within as interval))
