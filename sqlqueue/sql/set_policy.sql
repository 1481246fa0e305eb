-- Set the rules of a queue or task, or take them away.
--
-- moves   ready -> waiting, waiting -> ready
-- index   policy_pkey
-- locks   the policy's row, and jobs that have not started
-- caller  Queue.set_policy
select sqlqueue.set_policy(:scope, :name, cast(:rules as jsonb))
