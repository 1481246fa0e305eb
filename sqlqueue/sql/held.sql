-- Say which of some runs still hold their lease.
--
-- moves   nothing
-- index   lease_pkey
-- locks   nothing
-- caller  Worker, for runs that finish did not end: held ones were locked and are tried again
select cast(asked.job_id as text) as job_id
from unnest(cast(:job_ids as uuid[]), cast(:runs as integer[])) as asked (job_id, run)
cross join lateral (  -- never the other way round, which reads every lease
    select run
    from sqlqueue.lease
    where lease.job_id = asked.job_id and lease.run = asked.run
    limit 1
) as lease
