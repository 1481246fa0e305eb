-- Stop claiming from a queue, or go on.
--
-- moves   nothing
-- index   queue_pkey
-- locks   the queue's row
-- caller  Queue.pause, Queue.resume
insert into sqlqueue.queue (name, paused_at, paused_by, paused_why, resumes_at)
values (
    :queue, case when cast(:is_paused as boolean) then now() end, :by, :why,
    now() + cast(:lasts as interval)
)
on conflict (name) do update
set paused_at = excluded.paused_at,
    paused_by = excluded.paused_by,
    paused_why = excluded.paused_why,
    resumes_at = excluded.resumes_at
returning name
