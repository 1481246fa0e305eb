-- Lock up to :batch leases whose worker is dead, to be ended as crashed.
--
-- moves   nothing
-- index   lease_worker
-- locks   the leases it returns; skips those locked elsewhere, so it never waits
-- caller  rescue
--
-- The row of a dead worker stays as long as there are leases of it.
select
    cast(orphan.job_id as text) as job_id,
    orphan.run,
    orphan.worker_id,
    orphan.crashes + 1 >= job.max_crashes as is_last
from sqlqueue.worker
cross join lateral (  -- never the other way round, which reads every lease
    select job_id, run, worker_id, crashes
    from sqlqueue.lease
    where worker_id = worker.id
    limit :batch
    for update skip locked
) as orphan
join sqlqueue.job on job.id = orphan.job_id
where worker.died_at is not null
limit :batch
