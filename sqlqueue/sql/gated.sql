-- Say which of some queues have jobs that may have to wait under a policy.
--
-- moves   nothing
-- index   policy_pkey
-- locks   nothing
-- caller  Worker, with each sweep
select served.queue
from unnest(cast(:queues as text[])) as served (queue)
where exists (
    select
    from sqlqueue.policy
    where scope = 'task' or (scope = 'queue' and name = served.queue)
)
