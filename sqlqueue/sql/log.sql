-- Keep lines that runs have said.
--
-- moves   nothing
-- index   log_pkey
-- locks   nothing
-- caller  upkeep; Worker, when it ends
insert into sqlqueue.log (
    job_id, run, seq, at, level, logger, source, message, fields, progress
)
select
    job_id, run, seq, clock_timestamp() - make_interval(secs => greatest(age, 0)), level, logger,
    source, message, fields, progress
from json_to_recordset(cast(:lines as json)) as line (
    job_id uuid, run integer, seq integer, age double precision, level text, logger text,
    source text, message text, fields jsonb, progress real
)
on conflict (job_id, run, seq) do nothing  -- after a commit whose outcome was not known
returning seq
