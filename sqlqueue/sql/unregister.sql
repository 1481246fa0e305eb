-- Mark a worker that stops as dead: should it have left a lease behind, others take it.
--
-- moves   nothing
-- index   worker_pkey
-- locks   the worker's row
-- caller  Worker, at its end
select sqlqueue.unregister(:worker)
