-- Add a worker; return its id.
--
-- moves   nothing
-- index   none
-- locks   the row it adds
-- caller  Worker, at its start and after it was declared dead
insert into sqlqueue.worker (ttl, pid, slots, host, name, version, queues, tasks)
values (
    :ttl, :pid, :slots, :host, :name, :version, cast(:queues as text[]), cast(:tasks as text[])
)
returning id
