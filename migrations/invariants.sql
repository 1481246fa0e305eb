-- Say what must never be: a row for each rule that is broken, and the job or key that breaks it.
--
-- Reads every job and run there is, in one snapshot, and locks nothing: it is as right beside
-- workers as without them, and takes long where the history is. Runs are kept for as long as their
-- job, but for a job whose id is a day ahead of its end; so some rules leave out the oldest day.
-- A limit that was made smaller is exceeded until enough jobs have ended.
with oldest as (
    select sqlqueue.uuid_at(now() - retention + interval '1 day') as id
    from sqlqueue.setting
),
live as (
    select job_id, run, run as last_run, 'ready' as place, admission from sqlqueue.ready
    union all
    select job_id, run, run, 'waiting', 0 from sqlqueue.waiting
    union all
    select job_id, run, run, 'scheduled', admission from sqlqueue.scheduled
    union all
    select job_id, run, run - 1, 'lease', admission from sqlqueue.lease
),
past as (
    select
        job_id, max(run) as last_run, count(distinct run) as runs,
        count(*) filter (where is_final) as finals
    from sqlqueue.run
    group by job_id
),
placed as (
    select job_id, array_agg(place order by place) as places
    from (
        select job_id, place from live
        union all
        select job_id, 'run' from past where finals > 0
    ) as found
    group by job_id
)
select
    'a job is in no table' as rule, cast(id as text) as what,
    'it is not ready, waiting, scheduled or leased, and has not ended' as detail
from sqlqueue.job
where id >= (select id from oldest)
  and not exists (select from placed where job_id = job.id)
union all
select 'a job is in two tables', cast(job_id as text), array_to_string(places, ', ')
from placed
where cardinality(places) > 1
union all
select 'a row has no job', cast(job_id as text), place
from live
where not exists (select from sqlqueue.job where id = job_id)
union all
select 'a job has ended twice', cast(job_id as text), finals || ' final runs'
from past
where finals > 1
union all
select 'a run is there twice', cast(job_id as text), 'run ' || run
from (
    select job_id, run from sqlqueue.run
    union all
    select job_id, run from sqlqueue.lease
) as numbered
group by job_id, run
having count(*) > 1
union all
select
    'a run has the number of an earlier one', cast(job_id as text),
    'run ' || live.run || ' in ' || place || ', after run ' || past.last_run
from live
join past using (job_id)
where live.last_run < past.last_run
union all
select
    'a run is not recorded', cast(job_id as text),
    'of ' || coalesce(live.last_run, past.last_run) || ' runs that ended, '
        || coalesce(past.runs, 0) || ' are'
from live
full join past using (job_id)
where job_id >= (select id from oldest)
  and coalesce(past.runs, 0) < coalesce(live.last_run, past.last_run)
union all
select 'a place is held by no job', cast(job_id as text), scope || ' ' || name
from sqlqueue.admitted
where not exists (select from live where live.job_id = admitted.job_id and admission > 0)
union all
select 'a job was admitted and holds no place', cast(job_id as text), place
from live
where admission > 0
  and not exists (select from sqlqueue.admitted where admitted.job_id = live.job_id)
union all
select
    'a limit is exceeded', scope || ' ' || name, count(*) || ' places are held of ' || concurrency
from sqlqueue.policy
join sqlqueue.admitted using (scope, name)
group by scope, name, concurrency
having count(*) > concurrency
union all
select
    'a limit of a key is exceeded', concat_ws(' ', scope, name, key),
    count(*) || ' places are held of '
        || case when keeps_order then 1 else concurrency_per_key end
from sqlqueue.policy
join sqlqueue.admitted using (scope, name)
group by scope, name, key, keeps_order, concurrency_per_key
having count(*) > case when keeps_order then 1 else concurrency_per_key end
union all
select 'a job that has ended holds its unique key', unique_claim.key, cast(job_id as text)
from sqlqueue.unique_claim
join past using (job_id)
where finals > 0
  and coalesce(lasts_until <= now(), true)
  and sqlqueue.is_held(unique_claim)
union all
-- One that has started may do without: its key may be free by then, and taken by another.
select 'a job does not hold its unique key', unique_key, cast(id as text)
from sqlqueue.job
join live on live.job_id = job.id
where unique_key is not null
  and live.run = 0
  and not exists (
      select from sqlqueue.unique_claim where key = unique_key and unique_claim.job_id = job.id
  )
  and not exists (select from sqlqueue.cancel_request where cancel_request.job_id = job.id)
