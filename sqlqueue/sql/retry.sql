-- Make a failed or cancelled job ready again, with all its attempts; return a row if it was one.
--
-- moves   run -> ready
-- index   run_pkey
-- locks   the final run
-- caller  Job.retry
--
-- The past runs stay, the last one no longer final, and the numbers of runs go on.
with reopened as (
    update sqlqueue.run
    set is_final = false
    where run.job_id = cast(:job_id as uuid)
      and is_final
      and outcome not in ('succeeded', 'expired')  -- it would expire again
      and exists (select from sqlqueue.job where job.id = run.job_id)
    returning job_id, run
),
forgotten as (
    delete from sqlqueue.cancel_request
    where job_id in (select job_id from reopened)
),
added as (
    insert into sqlqueue.ready (job_id, due_at, run, priority, queue)
    select job.id, now(), reopened.run, job.priority, job.queue
    from reopened
    join sqlqueue.job on job.id = reopened.job_id
    returning queue, priority
)
select sqlqueue.ring(queue, cast(priority as text)) as silence
from added
