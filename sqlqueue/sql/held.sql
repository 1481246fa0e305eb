-- Say which of some runs still hold their lease.
--
-- moves   nothing
-- index   lease_pkey
-- locks   nothing
-- caller  Worker, for runs that finish did not end: held ones were locked and are tried again
select cast(lease.job_id as text) as job_id
from unnest(cast(:job_ids as uuid[]), cast(:runs as integer[])) as asked (job_id, run)
join sqlqueue.lease on lease.job_id = asked.job_id and lease.run = asked.run
