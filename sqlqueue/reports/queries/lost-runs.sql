-- Runs of the last day whose worker died, and what became of their jobs.
select runs.job_id, runs.run, runs.worker_id, runs.ended_at, runs.error, jobs.task, jobs.state
from sqlqueue.runs
join sqlqueue.jobs on jobs.id = runs.job_id
where runs.outcome = 'crashed' and runs.ended_at > now() - interval '1 day'
order by runs.ended_at desc
limit 50
