-- Pause a queue or a task, or end its pause.
--
-- moves   ready -> waiting, waiting -> ready
-- index   queue_pkey, policy_pkey
-- locks   the row of the queue or policy; of a task, jobs that have not started
-- caller  Queue.pause, Queue.resume
select sqlqueue.pause(:scope, :name, :is_paused, :by, :why, cast(:lasts as interval))
