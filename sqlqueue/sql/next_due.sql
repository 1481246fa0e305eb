-- Say how long it is until the next job is due, or the next schedule, if that is soon.
--
-- moves   nothing
-- index   scheduled_due, schedule_next
-- locks   nothing
-- caller  upkeep
select sqlqueue.next_due()
