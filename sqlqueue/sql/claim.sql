-- Lease up to :slots ready jobs of one lane to one worker.
--
-- moves   ready -> lease
-- index   ready_claim
-- locks   the rows it takes; skips rows locked elsewhere, so it never waits
-- caller  Worker, once per turn and lane
with picked as (
    delete from sqlqueue.ready
    where ctid = any (array(  -- an array of ctids is a TID scan: no statistics can spoil it
        select ctid
        from sqlqueue.ready
        where queue = :queue
          and is_suspect = :is_suspect
          and priority = :priority
          and seq > :floor  -- steps over rows that are dead but cannot be vacuumed yet
          and (
              select heartbeat_at > now() - ttl and died_at is null
              from sqlqueue.worker
              where id = :worker
          )
          and not coalesce((
              select paused_at is not null and coalesce(resumes_at > now(), true)
              from sqlqueue.queue
              where name = :queue
          ), false)
        order by seq
        limit :slots
        for update skip locked
    ))
    returning job_id, due_at, run + 1 as run, failures, crashes, priority, queue, seq, admission
),
leased as (
    insert into sqlqueue.lease (
        job_id, due_at, run, failures, crashes, priority, queue, seq, admission, worker_id,
        claimed_at
    )
    select
        job_id, due_at, run, failures, crashes, priority, queue, seq, admission, :worker,
        statement_timestamp()  -- now() may be older than what this statement sees
    from picked
)
select
    cast(picked.job_id as text) as job_id, picked.run, picked.seq, job.task,
    cast(job.args as text) as args, picked.queue, picked.failures, job.attempts, job.executor,
    job.keep, cast(job.headers as text) as headers, cast(job.retry as text) as retry,
    picked.crashes + 1 >= job.max_crashes as is_last_crash,
    cast(extract(epoch from job.timeout) as double precision) as timeout,
    picked.run = 1 and job.expires_at <= now() as is_expired,
    exists (
        select from sqlqueue.cancel_request where cancel_request.job_id = picked.job_id
    ) as is_cancelled,
    cast(extract(epoch from statement_timestamp()) as double precision) as claimed_at,
    cast(extract(epoch from statement_timestamp() - picked.due_at) as double precision) as waited
from picked
left join sqlqueue.job on job.id = picked.job_id
order by picked.seq
