-- Prepare the transaction of a turn: plans by index only, and no long silence before the commit.
--
-- moves   nothing
-- index   none
-- locks   nothing
-- caller  Worker and upkeep, first in every transaction
--
-- A plan that was cached while a hot table was empty, or made before it was ever analyzed, may
-- scan it or sort it; with these off only the indexes are left. Before Postgres 18 what is off
-- counts as so dear that each plan would be compiled, for seconds. A process that stalls between a
-- statement and its commit would hide the locked rows from rescue for ever: :patience ends it.
select
    set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
    set_config('enable_sort', 'off', true), set_config('enable_hashjoin', 'off', true),
    set_config('enable_mergejoin', 'off', true), set_config('jit', 'off', true),
    set_config('idle_in_transaction_session_timeout', cast(:patience as text), true)
