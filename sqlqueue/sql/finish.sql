-- End runs: record each outcome, and move each job to where it goes next.
--
-- moves   lease -> run, lease -> scheduled, lease -> ready
-- index   lease_pkey, job_pkey
-- locks   the leases it ends; skips those locked elsewhere, so it never waits
-- caller  Worker, once per turn; Run.finish, in the transaction of the task; rescue
--
-- A run is ended if its lease is still there, with its number; of the others nothing is recorded,
-- and if there are such, the jobs of those that were ended come back. :waits says when the job
-- runs again, null that it has ended. A job that somebody asked to cancel does not run again.
with counted as materialized (
    select
        lease.place, lease.job_id, lease.run, lease.due_at, lease.priority, lease.queue, lease.seq,
        lease.worker_id, lease.claimed_at, lease.admission, lease.failures, ended.ran, ended.result,
        ended.traceback,
        lease.failures + cast(ended.outcome in ('failed', 'timed_out') as integer) as failures_now,
        lease.crashes + cast(ended.outcome = 'crashed' as integer) as crashes_now,
        case when asked.reason is null then ended.outcome else 'cancelled' end as outcome,
        case when asked.reason is null then ended.wait end as wait,
        case when asked.reason is null then ended.error_type else 'cancelled' end as error_type,
        coalesce(asked.reason, ended.error) as error,
        case when ended.outcome in ('failed', 'timed_out', 'crashed') then (
            select task from sqlqueue.job where job.id = ended.job_id
        ) end as task
    from unnest(
        cast(:job_ids as uuid[]), cast(:runs as integer[]), cast(:outcomes as text[]),
        cast(:waits as interval[]), cast(:rans as double precision[]),
        cast(:results as jsonb[]), cast(:error_types as text[]), cast(:errors as text[]),
        cast(:tracebacks as text[])
    ) as ended (job_id, run, outcome, wait, ran, result, error_type, error, traceback)
    cross join lateral (  -- never the other way round, which reads every lease
        select
            ctid as place, job_id, due_at, run, failures, crashes, priority, queue, seq,
            admission, worker_id, claimed_at
        from sqlqueue.lease
        where lease.job_id = ended.job_id and lease.run = ended.run
        for update skip locked
    ) as lease
    left join sqlqueue.cancel_request as asked
        on asked.job_id = lease.job_id
        and (ended.wait is not null or ended.outcome = 'cancelled')
),
freed as (
    delete from sqlqueue.lease
    where ctid = any (array(select place from counted))
),
recorded as (
    insert into sqlqueue.run (
        job_id, run, ended_at, started_at, due_at, worker_id, ran, attempt, crashes, is_final,
        outcome, result, error_type, error, traceback, queue, task, fingerprint
    )
    select
        job_id, run, statement_timestamp(), claimed_at, due_at, worker_id, ran, failures + 1,
        crashes_now, wait is null, outcome, result, error_type, error, traceback,
        case when task is not null then queue end, task,
        case when task is not null then
            sqlqueue.fingerprint(task, outcome, error_type, traceback)
        end
    from counted
),
back as (
    insert into sqlqueue.ready (
        job_id, due_at, run, failures, crashes, priority, queue, seq, admission
    )
    select job_id, due_at, run, failures_now, crashes_now, priority, queue, seq, admission
    from counted
    where wait is not null and outcome in ('returned', 'crashed')
),
later as (
    insert into sqlqueue.scheduled (
        job_id, due_at, run, failures, crashes, priority, queue, reason, admission
    )
    select
        job_id, now() + least(greatest(wait, '0'), '100 years'), run,
        failures_now, crashes_now, priority, queue,
        case when outcome = 'snoozed' then 'snooze' else 'retry' end,
        case when admission = 2 then 2 else 0 end
    from counted
    where wait is not null and outcome not in ('returned', 'crashed')
),
left_place as (
    delete from sqlqueue.admitted
    where job_id = any (array(
        select job_id
        from counted
        where admission > 0
          and (wait is null or admission = 1 and outcome not in ('returned', 'crashed'))
    ))
    returning job_id, scope, name
),
judged as (
    insert into sqlqueue.verdict (scope, name, is_failure)
    select left_place.scope, left_place.name, counted.outcome <> 'succeeded'
    from left_place
    join counted on counted.job_id = left_place.job_id
    join sqlqueue.policy on policy.scope = left_place.scope and policy.name = left_place.name
    where policy.breaks_after is not null
      and counted.outcome in ('succeeded', 'failed', 'timed_out', 'crashed')
)
select
    count(*) = cardinality(cast(:runs as integer[])) as are_all,
    case when count(*) < cardinality(cast(:runs as integer[])) then
        array_agg(cast(job_id as text))
    end as some,
    case when cast(:patience as text) is not null then
        -- a process that stalls before its commit would hide the lease from rescue for ever
        set_config('idle_in_transaction_session_timeout', cast(:patience as text), true)
    end as silence
from counted
