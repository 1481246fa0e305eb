-- Give a sign of life; return what an operator told it, nothing if it is dead or should be.
--
-- moves   nothing
-- index   worker_pkey
-- locks   the worker's row
-- caller  heartbeat; the supervisor, for a child that cannot
select sqlqueue.beat(:worker, :usage)
