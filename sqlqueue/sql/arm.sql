-- Hang a worker's bell at each of its queues that has none, for :patience.
--
-- moves   nothing
-- index   doorbell_pkey
-- locks   the rows it adds and replaces; skips rows locked elsewhere, so it never waits
-- caller  Worker, before it looks once more and sleeps
--
-- One bell for each queue: more would make every job ring while many workers just keep up.
with old as (
    delete from sqlqueue.doorbell
    where ctid = any (array(
        select ctid
        from sqlqueue.doorbell
        where queue = any (cast(:queues as text[]))
          and rings_until > now()
          and worker_id = :worker
        for update skip locked
    ))
)
insert into sqlqueue.doorbell (queue, rings_until, worker_id)
select served.queue, now() + :patience, :worker
from unnest(cast(:queues as text[])) as served (queue)
where not exists (
    select
    from sqlqueue.doorbell
    where doorbell.queue = served.queue
      and doorbell.rings_until > now()
      and doorbell.worker_id <> :worker
)
on conflict do nothing
returning queue
