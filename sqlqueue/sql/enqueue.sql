-- Add the jobs of one task with one set of options; return how many were new.
--
-- moves   nothing -> ready, nothing -> scheduled
-- index   the primary keys
-- locks   the rows it adds; rings (see the function) when a worker sleeps at the queue's bell
-- caller  Task.enqueue, Queue.send, Queue.enqueue_many; sqlqueue.enqueue calls the same function
--
-- The function is the one definition of enqueuing, also for other languages. It returns null,
-- having done nothing, when an id is out of range.
select sqlqueue.enqueue_many(
    ids => cast(:ids as uuid[]),
    args => cast(:args as jsonb[]),
    task => cast(:task as text),
    queue => cast(:queue as text),
    priority => cast(:priority as integer),
    attempts => cast(:attempts as integer),
    max_crashes => cast(:max_crashes as integer),
    keep => cast(:keep as boolean),
    delay => cast(:delay as interval),
    run_at => cast(:run_at as timestamptz),
    expires_in => cast(:expires_in as interval),
    expires_at => cast(:expires_at as timestamptz),
    timeout => cast(:timeout as interval),
    retry => cast(:retry as jsonb),
    executor => cast(:executor as text),
    tags => cast(:tags as text[]),
    description => cast(:description as text),
    headers => cast(:headers as jsonb)
)
