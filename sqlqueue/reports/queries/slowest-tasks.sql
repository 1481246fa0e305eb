-- The tasks whose runs took the most time in the last day, and how long one takes.
select
    task, sum(succeeded + failed + retried) as runs,
    sqlqueue.hist_quantile(sqlqueue.hist_sum(ran_hist), 0.5) as ran_p50,
    sqlqueue.hist_quantile(sqlqueue.hist_sum(ran_hist), 0.95) as ran_p95
from sqlqueue.hours
where at >= now() - interval '1 day'
group by task
order by ran_p95 desc nulls last
limit 20
