-- Add the jobs of one task with one set of options; return how many were new.
--
-- moves   nothing -> ready, nothing -> waiting, nothing -> scheduled
-- index   the primary keys
-- locks   the rows it adds; rings (see sqlqueue.ring) when a worker sleeps at the queue's bell
-- caller  Task.enqueue, Queue.send, Queue.enqueue_many; the function sqlqueue.enqueue is the same
--
-- All parameters are sent as text, which is quickest. If an id is not between the retention back
-- and one day ahead, or the queue is full, nothing is done. What is due within a second rings:
-- upkeep looks less often.
with gate as materialized (  -- no row: no policy
    select flow, ageing, places
    from sqlqueue.gate(cast(:queue as text), cast(:task as text), cast(:key as text))
    where exists (select from sqlqueue.policy)  -- looked at first, and mostly empty
),
given as materialized (
    select
        sqlqueue.uuid_at(now() + interval '1 day') >= all (cast(:ids as uuid[]))
        and sqlqueue.uuid_at(now() - (select retention from sqlqueue.setting))
            <= all (cast(:ids as uuid[])) as are_in_range,
        exists (select from gate where places < cardinality(cast(:ids as uuid[]))) as is_full
),
added as (
    insert into sqlqueue.job (
        id, due_at, expires_at, timeout, priority, attempts, max_crashes, keep, task, queue, args,
        retry, executor, tags, description, headers, key, weight, unique_key
    )
    select
        call.id,
        nullif(greatest(
            cast(:run_at as timestamptz), now() + cast(:delay as interval), now()
        ), now()),
        coalesce(cast(:expires_at as timestamptz), now() + cast(:expires_in as interval)),
        cast(:timeout as interval), cast(:priority as smallint), cast(:attempts as smallint),
        cast(:max_crashes as smallint), cast(:keep as boolean), cast(:task as text),
        cast(:queue as text), call.args, cast(:retry as jsonb), cast(:executor as text),
        cast(:tags as text[]), cast(:description as text), cast(:headers as jsonb),
        cast(:key as text), cast(:weight as integer), call.unique_key
    from unnest(
        cast(:ids as uuid[]), cast(:all_args as jsonb[]), cast(:unique_keys as text[])
    ) as call (id, args, unique_key)
    where (select are_in_range and not is_full from given)
    on conflict (id) do nothing
    returning id, due_at
),
at_once as (
    insert into sqlqueue.ready (job_id, due_at, priority, queue)
    select id, now(), cast(:priority as smallint), cast(:queue as text)
    from added
    where due_at is null and not exists (select from gate)
),
held as (
    insert into sqlqueue.waiting (job_id, due_at, priority, queue, flow, weight, rank)
    select
        added.id, now(), cast(:priority as smallint), cast(:queue as text), gate.flow,
        coalesce(cast(:weight as integer), 1),
        sqlqueue.rank(now(), cast(:priority as smallint), gate.ageing)
    from added
    cross join gate
    where added.due_at is null
),
later as (
    insert into sqlqueue.scheduled (job_id, due_at, priority, queue, reason)
    select id, due_at, cast(:priority as smallint), cast(:queue as text), 'delay'
    from added
    where due_at is not null
)
select
    (select are_in_range from given) as are_in_range,
    (select is_full from given) as is_full,
    count(*) as added,
    case
        when count(*) > 0
            and coalesce(min(due_at), now()) < now() + interval '1 second'
            and exists (
                select
                from sqlqueue.doorbell
                where queue = cast(:queue as text)
                  and rings_until > statement_timestamp()  -- steps over rows that are dead
            )
        then sqlqueue.ring(
            cast(:queue as text),
            case
                when min(due_at) is null then cast(cast(:priority as smallint) as text)
                else 'due'
            end
        ) is null
    end as silence
from added
