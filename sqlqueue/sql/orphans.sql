-- Lock up to :batch leases whose worker is dead or unknown, to be ended as crashed.
--
-- moves   nothing
-- index   lease_worker
-- locks   the leases it returns; skips those locked elsewhere, so it never waits
-- caller  rescue
--
-- The holders of leases are found by steps over the index, one for each worker.
with recursive holder as (
    (
        select worker_id
        from sqlqueue.lease
        order by worker_id
        limit 1
    )
    union all
    select (
        select lease.worker_id
        from sqlqueue.lease
        where lease.worker_id > holder.worker_id
        order by lease.worker_id
        limit 1
    )
    from holder
    where holder.worker_id is not null
)
select
    cast(lease.job_id as text) as job_id,
    lease.run,
    lease.worker_id,
    lease.crashes + 1 >= job.max_crashes as is_last
from holder
join sqlqueue.lease on lease.worker_id = holder.worker_id
join sqlqueue.job on job.id = lease.job_id
where not exists (
    select
    from sqlqueue.worker
    where worker.id = holder.worker_id and worker.died_at is null
)
limit :batch
for update of lease skip locked
