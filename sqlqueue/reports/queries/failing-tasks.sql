-- The tasks that failed most in the last day, as a share of the jobs that ended.
select
    task, sum(failed) as failed, sum(succeeded) as succeeded,
    round(sum(failed) / nullif(sum(failed + succeeded), 0), 4) as share
from sqlqueue.hours
where at >= now() - interval '1 day'
group by task
having sum(failed) > 0
order by failed desc
limit 20
