-- Wake every idle worker: whoever answered the bell has filled its slots, and there is more.
--
-- moves   nothing
-- index   none
-- locks   the notification queue, until it commits
-- caller  Worker, in the turn that filled its slots after a sleep
select pg_notify('sqlqueue', concat_ws(' ', 0, cast(:priority as integer), cast(:queue as text)))
