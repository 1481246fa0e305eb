-- Take a worker's bells away: it is awake.
--
-- moves   nothing
-- index   doorbell_pkey
-- locks   the rows it removes; skips rows locked elsewhere, so it never waits
-- caller  Worker, in the turn that found work after a sleep
delete from sqlqueue.doorbell
where ctid = any (array(
    select ctid
    from sqlqueue.doorbell
    where queue = any (cast(:queues as text[]))
      and rings_until > now()
      and worker_id = :worker
    for update skip locked
))
returning queue
