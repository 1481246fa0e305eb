-- Make up to :batch jobs ready whose time has come; return how many in each lane.
--
-- moves   scheduled -> ready, scheduled -> waiting
-- index   scheduled_due, job_pkey
-- locks   the rows it takes; skips rows locked elsewhere, so it never waits
-- caller  upkeep
select queue, priority, moved
from sqlqueue.promote(cast(:within as interval), :batch)
