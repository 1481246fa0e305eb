-- The unended jobs with the largest arguments.
select id, task, queue, state, octet_length(cast(args as text)) as bytes
from sqlqueue.live
order by bytes desc
limit 20
