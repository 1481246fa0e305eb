-- Tell the worker of a running job that it is to be cancelled; return a row if it is running.
--
-- moves   nothing
-- index   lease_pkey
-- locks   the notification queue, until it commits
-- caller  Job.cancel; should the notification be lost, the worker's next beat sees the request
select pg_notify('sqlqueue', concat_ws(' ', worker_id, 'cancel', job_id))
from sqlqueue.lease
where job_id = cast(:job_id as uuid)
