-- Wake every idle worker: one that answered the bell has filled its slots, or one stops.
--
-- moves   nothing
-- index   none
-- locks   the notification queue, until it commits
-- caller  Worker, in the turn that filled its slots after a sleep, and at its end
select sqlqueue.notify(concat_ws(' ', 0, cast(:priority as integer), cast(:queue as text)))
