-- Make a failed or cancelled job ready again, with all its attempts; say whether it was one.
--
-- moves   run -> ready, run -> waiting
-- index   run_pkey
-- locks   the final run, and the claim on its unique key
-- caller  Job.retry
--
-- The past runs stay, the last one no longer final, and the numbers of runs go on. A job whose
-- unique key another job has taken meanwhile stays as it is.
select sqlqueue.retry(cast(:job_id as uuid))
