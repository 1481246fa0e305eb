-- Add what a worker has counted; once a minute, whoever comes first samples levels and folds.
--
-- moves   nothing
-- index   flow_at, flow_once, job_created
-- locks   setting, unless it is locked elsewhere; the sums of each queue and task
-- caller  upkeep; Worker, when it ends
select sqlqueue.count_runs(cast(:counts as jsonb))
