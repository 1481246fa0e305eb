-- Declare workers dead: those silent for longer than their ttl, and one whose end was seen.
--
-- moves   nothing
-- index   worker_pkey
-- locks   the rows it marks; skips rows locked elsewhere, so it never waits
-- caller  rescue
--
-- From its commit on such a worker can neither beat nor claim, and its leases are orphans.
update sqlqueue.worker
set died_at = now()
where id = any (array(
    select id
    from sqlqueue.worker
    where died_at is null
      and (heartbeat_at < now() - ttl or id = cast(:seen_dead as bigint))
    for update skip locked
))
returning id, name
