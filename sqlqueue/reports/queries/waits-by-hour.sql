-- How long jobs waited in each hour of the last day, by queue.
select
    at, queue, sum(started) as runs,
    sqlqueue.hist_quantile(sqlqueue.hist_sum(waited_hist), 0.5) as waited_p50,
    sqlqueue.hist_quantile(sqlqueue.hist_sum(waited_hist), 0.95) as waited_p95
from sqlqueue.hours
where at >= now() - interval '1 day'
group by at, queue
order by at, queue
