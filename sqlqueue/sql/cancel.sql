-- Cancel a job that is scheduled, waiting or ready; return a row if it was.
--
-- moves   scheduled -> run, waiting -> run, ready -> run
-- index   ready_pkey, waiting_pkey, scheduled_pkey, admitted_pkey
-- locks   the row it takes; waits for a promotion or a claim of it to commit
-- caller  Job.cancel, twice: a job that moves while it looks is met the second time
select sqlqueue.cancel_unstarted(cast(:job_id as uuid), :reason)
