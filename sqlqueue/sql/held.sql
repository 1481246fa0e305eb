-- Say which of some runs still hold their lease.
--
-- moves   nothing
-- index   lease_pkey
-- locks   nothing
-- caller  Worker, for runs that finish did not end: held ones were locked and are tried again
select job_id from sqlqueue.held(cast(:job_ids as uuid[]), cast(:runs as integer[]))
