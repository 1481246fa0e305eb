-- Lock up to :batch leases whose worker is dead or unknown, to be ended as crashed.
--
-- moves   nothing
-- index   lease_worker
-- locks   the leases it returns; skips those locked elsewhere, so it never waits
-- caller  rescue
--
-- With :strays, also those whose worker has no row: they are found by steps over the index, one
-- for each holder of leases, which walk over rows that are dead but cannot be vacuumed yet.
with recursive holder as (
    (
        select worker_id
        from sqlqueue.lease
        where cast(:strays as boolean)
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
),
dead as (
    select id
    from sqlqueue.worker
    where died_at is not null
    union all
    select worker_id
    from holder
    where not exists (select from sqlqueue.worker where worker.id = holder.worker_id)
)
select
    cast(lease.job_id as text) as job_id,
    lease.run,
    lease.worker_id,
    lease.crashes + 1 >= job.max_crashes as is_last
from dead
join sqlqueue.lease on lease.worker_id = dead.id
join sqlqueue.job on job.id = lease.job_id
limit :batch
for update of lease skip locked
