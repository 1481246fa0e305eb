-- Make up to :room waiting jobs of a queue ready, as its policies allow.
--
-- moves   waiting -> ready
-- index   waiting_flow, admitted_places
-- locks   the queue's row in turn, policies of tasks, the rows it takes; skips what is locked
-- caller  Worker, before it claims from a queue that has a policy
--
-- Returns how many it moved in each lane; a row without one says when there may be more.
select priority, moved, wait
from sqlqueue.admit(:queue, cast(:room as integer))
