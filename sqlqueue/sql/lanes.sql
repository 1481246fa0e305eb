-- Find lanes of a queue that lie between those known: one for each gap that is not empty.
--
-- moves   nothing
-- index   ready_claim
-- locks   nothing
-- caller  Worker, with each sweep
--
-- :known holds the known priorities in order. Known lanes are stepped over, dead rows and all.
select found.queue, found.priority, found.is_suspect
from unnest(
    cast(-101 || cast(:known as integer[]) as integer[]),
    cast(cast(:known as integer[]) || 101 as integer[])
) as gap (low, high)
cross join lateral (
    select queue, priority, is_suspect
    from sqlqueue.ready
    where queue = :queue
      and is_suspect = :is_suspect
      and priority > gap.low
      and priority < gap.high
    order by priority
    limit 1
) as found
