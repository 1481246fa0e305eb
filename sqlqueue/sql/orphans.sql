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
    cast(orphan.job_id as text) as job_id,
    orphan.run,
    orphan.worker_id,
    orphan.crashes + 1 >= job.max_crashes as is_last
from dead
cross join lateral (  -- never the other way round, which reads every lease
    select job_id, run, worker_id, crashes
    from sqlqueue.lease
    where worker_id = dead.id
    limit :batch
    for update skip locked
) as orphan
join sqlqueue.job on job.id = orphan.job_id
limit :batch
