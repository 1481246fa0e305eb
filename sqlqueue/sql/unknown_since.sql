-- Say for how many seconds a job has waited for a worker that knows its task.
--
-- moves   nothing
-- index   run_pkey
-- locks   nothing
-- caller  Worker, for a job whose task it does not know
select sqlqueue.unknown_since(cast(:job_id as uuid))
