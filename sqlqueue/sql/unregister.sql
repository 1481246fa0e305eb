-- Remove a worker that has stopped and holds nothing.
--
-- moves   nothing
-- index   worker_pkey
-- locks   the row it removes
-- caller  Worker, at its end
delete from sqlqueue.worker
where id = :worker
