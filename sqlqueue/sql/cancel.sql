-- Ask for a job to be cancelled; end it if it has not started, tell its worker if it runs.
--
-- moves   scheduled -> run, waiting -> run, ready -> run
-- index   ready_pkey, waiting_pkey, scheduled_pkey, lease_pkey, admitted_pkey
-- locks   the row it takes; waits for a promotion or a claim of it to commit
-- caller  Job.cancel
select sqlqueue.cancel(cast(:job_id as uuid), :reason)
