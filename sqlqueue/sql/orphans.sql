-- Declare workers dead, and lock up to :batch leases of the dead, to be ended as crashed.
--
-- moves   nothing
-- index   lease_worker
-- locks   the workers and leases; skips those locked elsewhere, so it never waits
-- caller  rescue
--
-- Dead are those silent for longer than their ttl, and one whose end was seen. The row of a dead
-- worker stays as long as there are leases of it.
select job_id, run, worker_id, is_last
from sqlqueue.rescue(:batch, cast(:seen_dead as bigint))
