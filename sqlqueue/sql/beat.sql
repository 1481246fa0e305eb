-- Give a sign of life; return nothing if the worker was declared dead, or should have been.
--
-- moves   nothing
-- index   worker_pkey
-- locks   the worker's row
-- caller  heartbeat; the supervisor, for a child that cannot
update sqlqueue.worker
set heartbeat_at = now()
where id = :worker
  and died_at is null
  and heartbeat_at > now() - ttl
returning id
