-- Take a worker's bells away: it is awake.
--
-- moves   nothing
-- index   doorbell_pkey
-- locks   the rows it removes; skips rows locked elsewhere, so it never waits
-- caller  Worker, in the turn that found work after a sleep
select sqlqueue.disarm(cast(:queues as text[]), :worker)
