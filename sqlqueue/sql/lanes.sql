-- Find lanes of a queue that lie between those known: one for each gap that is not empty.
--
-- moves   nothing
-- index   ready_claim
-- locks   nothing
-- caller  Worker, with each sweep
--
-- :known holds the known priorities in order. Known lanes are stepped over, dead rows and all.
select queue, priority, is_suspect
from sqlqueue.lanes(:queue, cast(:known as integer[]), :is_suspect)
