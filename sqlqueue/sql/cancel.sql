-- Ask for a job to be cancelled; end it if it has not started, tell its worker if it runs.
--
-- moves   scheduled -> run, waiting -> run, ready -> run
-- index   ready_pkey, waiting_pkey, scheduled_pkey, lease_pkey, admitted_pkey
-- locks   the row it takes; waits for a promotion or a claim of it to commit
-- caller  Job.cancel, twice: a job that moves while it looks is met the second time
select sqlqueue.cancel(cast(:job_id as uuid), :reason)
