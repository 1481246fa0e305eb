-- Say which of some queues have jobs that may have to wait under a policy.
--
-- moves   nothing
-- index   policy_pkey
-- locks   nothing
-- caller  Worker, with each sweep
select queue
from sqlqueue.gated(cast(:queues as text[])) as queue
