-- Enqueue the jobs of a schedule for some instants, each once, and say when it is next.
--
-- moves   nothing
-- index   tick_pkey, schedule_pkey
-- locks   the schedule, which its caller has locked
-- caller  upkeep
select sqlqueue.fire(:name, cast(:instants as timestamptz[]), :next_at, :problem)
