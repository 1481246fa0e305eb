-- Hang a worker's bell at each of its queues that has none, for :patience.
--
-- moves   nothing
-- index   doorbell_pkey
-- locks   the rows it adds and replaces; skips rows locked elsewhere, so it never waits
-- caller  Worker, before it looks once more and sleeps
--
-- One bell for each queue: more would make every job ring while many workers just keep up.
select sqlqueue.arm(cast(:queues as text[]), :worker, :patience)
