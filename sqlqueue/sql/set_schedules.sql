-- Set schedules; with the tasks known to some code, the ones that it declares.
--
-- moves   nothing
-- index   schedule_pkey
-- locks   the schedules
-- caller  Queue.set_schedule; upkeep, when a worker starts
select sqlqueue.set_schedules(cast(:schedules as jsonb), cast(:known as text[]))
