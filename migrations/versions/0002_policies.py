"""Add policies: limits, rates, shares and order among the jobs of a queue or task.

adds    the tables policy, share, bucket, turn, admitted and verdict, and their functions
locks   nothing that is in use
time    constant; gives up after lock_timeout (2 s) and can be run again
undo    drops them: jobs that wait under a policy have to be let go first
"""

from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = r"""
create table sqlqueue.policy (
    scope text not null,
    name text not null,
    concurrency integer,
    concurrency_per_key integer,
    rate double precision,
    burst double precision,
    rate_per_key double precision,
    burst_per_key double precision,
    keeps_order boolean default false not null,
    ageing interval,
    max_waiting integer,
    breaks_after integer,
    breaks_for interval,
    failures integer default 0 not null,
    paused_at timestamptz,
    paused_by text,
    paused_why text,
    resumes_at timestamptz,
    primary key (scope, name),
    check (scope in ('queue', 'task'))
);
comment on table sqlqueue.policy
    is 'Rules for the jobs of a queue or task: those that have one wait until they are admitted';
comment on column sqlqueue.policy.scope
    is 'queue or task';
comment on column sqlqueue.policy.name
    is 'of the queue or task';
comment on column sqlqueue.policy.concurrency
    is 'jobs that run at a time; null: no limit';
comment on column sqlqueue.policy.concurrency_per_key
    is 'of these, with the same key';
comment on column sqlqueue.policy.rate
    is 'weight admitted in a second; null: no limit';
comment on column sqlqueue.policy.burst
    is 'weight admitted at once after a pause';
comment on column sqlqueue.policy.rate_per_key
    is 'of these, with the same key';
comment on column sqlqueue.policy.burst_per_key
    is 'of these, with the same key';
comment on column sqlqueue.policy.keeps_order
    is 'whether a job of a key starts only after the one before it has ended, retries included';
comment on column sqlqueue.policy.ageing
    is 'a job that has waited for this long is more urgent by one; null: never';
comment on column sqlqueue.policy.max_waiting
    is 'jobs that may wait: more are refused when they are enqueued';
comment on column sqlqueue.policy.breaks_after
    is 'failures in a row that pause it; null: never';
comment on column sqlqueue.policy.breaks_for
    is 'for how long; then one job at a time is tried until one succeeds';
comment on column sqlqueue.policy.failures
    is 'in a row, of the runs looked at so far';
comment on column sqlqueue.policy.paused_at
    is 'since when nothing is admitted; null: not paused';
comment on column sqlqueue.policy.paused_by
    is 'who paused it';
comment on column sqlqueue.policy.paused_why
    is 'why';
comment on column sqlqueue.policy.resumes_at
    is 'when the pause ends by itself; null: never';

create table sqlqueue.share (
    queue text not null,
    key text not null,
    weight integer not null,
    primary key (queue, key),
    check (weight > 0)
);
comment on table sqlqueue.share
    is 'Keys that have more than one job admitted when it is their turn';
comment on column sqlqueue.share.queue
    is 'the queue';
comment on column sqlqueue.share.key
    is 'the key';
comment on column sqlqueue.share.weight
    is 'jobs in each round';

create table sqlqueue.bucket (
    scope text not null,
    name text not null,
    key text not null,
    empty_until timestamptz not null,
    primary key (scope, name, key)
);
comment on table sqlqueue.bucket
    is 'What has been taken of a rate';
comment on column sqlqueue.bucket.scope
    is 'queue or task';
comment on column sqlqueue.bucket.name
    is 'of the queue or task';
comment on column sqlqueue.bucket.key
    is 'the key; with a space before it, since the one of all keys is empty';
comment on column sqlqueue.bucket.empty_until
    is 'when all that was admitted has been paid for at the rate: GCRA calls it TAT';

create table sqlqueue.turn (
    queue text not null,
    flow text default '' not null,
    primary key (queue)
);
comment on table sqlqueue.turn
    is 'Whose turn it is in a queue: whoever holds the row admits, nobody waits for it';
comment on column sqlqueue.turn.queue
    is 'the queue';
comment on column sqlqueue.turn.flow
    is 'the flow that was admitted last';

create table sqlqueue.admitted (
    job_id uuid not null,
    scope text not null,
    name text not null,
    key text not null,
    primary key (job_id, scope)
);
create index admitted_places on sqlqueue.admitted (scope, name, key);
comment on table sqlqueue.admitted
    is 'Places that jobs hold under policies, from admission until the run ends: limits count them';
comment on column sqlqueue.admitted.job_id
    is 'the job';
comment on column sqlqueue.admitted.scope
    is 'queue or task';
comment on column sqlqueue.admitted.name
    is 'of the queue or task';
comment on column sqlqueue.admitted.key
    is 'its key; empty: none';

create table sqlqueue.verdict (
    id bigint generated always as identity,
    scope text not null,
    name text not null,
    at timestamptz default statement_timestamp() not null,
    is_failure boolean not null,
    primary key (id)
);
create index verdict_rule on sqlqueue.verdict (scope, name, id);
comment on table sqlqueue.verdict
    is 'How runs ended under policies that break a circuit, until whoever admits looks at it';
comment on column sqlqueue.verdict.id
    is 'their order';
comment on column sqlqueue.verdict.scope
    is 'queue or task';
comment on column sqlqueue.verdict.name
    is 'of the queue or task';
comment on column sqlqueue.verdict.at
    is 'when the run ended';
comment on column sqlqueue.verdict.is_failure
    is 'whether it failed';

create table sqlqueue.unique_claim (
    key text not null,
    job_id uuid not null,
    taken_at timestamptz default now() not null,
    lasts_until timestamptz,
    ends_at_start boolean not null,
    primary key (key)
);
create index unique_claim_age on sqlqueue.unique_claim (taken_at);
comment on table sqlqueue.unique_claim
    is 'Which job holds a unique key: until it ends, whoever looks finds out whether it has';
comment on column sqlqueue.unique_claim.key
    is 'the key';
comment on column sqlqueue.unique_claim.job_id
    is 'the job that was enqueued with it last';
comment on column sqlqueue.unique_claim.taken_at
    is 'when that was enqueued';
comment on column sqlqueue.unique_claim.lasts_until
    is 'not free before this, whatever becomes of the job; null: as long as the job lasts';
comment on column sqlqueue.unique_claim.ends_at_start
    is 'whether it is free as soon as the job has started';
"""

FUNCTIONS = r"""
create function sqlqueue.gated(queues text[]) returns setof text
language sql stable
as $$
    select queue
    from unnest(queues) as queue
    where exists (
        select
        from sqlqueue.policy
        where scope = 'task' or (scope = 'queue' and name = queue)
    )
$$;
comment on function sqlqueue.gated is
    'Those of some queues in which jobs may have to wait under a policy';

create function sqlqueue.gate(queue text, task text, key text)
returns table (flow text, ageing interval, places bigint)
language sql stable
as $$
    select
        flow,
        ageing,
        case when most is not null then (
            select rules.most - count(*)
            from (
                select from sqlqueue.waiting where waiting.queue = gate.queue limit rules.most
            ) as counted
        ) end
    from (
        select
            coalesce(max(name) filter (where scope = 'task'), '') || ' '
                || coalesce(gate.key, '') as flow,
            max(ageing) as ageing,
            max(max_waiting) as most
        from sqlqueue.policy
        where (scope = 'queue' and name = gate.queue)
           or (scope = 'task' and name = gate.task)
        having count(*) > 0
    ) as rules
$$;
comment on function sqlqueue.gate is
    'The flow of a job if its queue or task has a policy, and the places left; else no row';

create function sqlqueue.rank(due_at timestamptz, priority integer, ageing interval)
returns double precision
language sql stable
as $$
    select coalesce(
        extract(epoch from due_at) + priority * extract(epoch from ageing), priority
    )
$$;
comment on function sqlqueue.rank is
    'Order within a flow; with ageing, one step of priority is worth that much waiting';

create function sqlqueue.room_in(
    rule sqlqueue.policy,
    for_key text,
    out places double precision,
    out tokens double precision,
    out wait double precision
)
language plpgsql volatile
as $$
declare
    most constant integer := case
        when for_key is null then rule.concurrency
        when rule.keeps_order then 1
        else rule.concurrency_per_key
    end;
    rate constant double precision :=
        case when for_key is null then rule.rate else rule.rate_per_key end;
    burst constant double precision :=
        case when for_key is null then rule.burst else rule.burst_per_key end;
begin
    places := 'infinity';
    tokens := 'infinity';
    if rule.name is null then
        return;
    end if;
    if rule.paused_at is not null and coalesce(rule.resumes_at > now(), true) then
        places := 0;
    elsif for_key is null and rule.failures >= rule.breaks_after then
        select 1 - count(*) into places
        from sqlqueue.admitted
        where scope = rule.scope and name = rule.name;
    elsif most is not null and for_key is null then
        select most - count(*) into places
        from sqlqueue.admitted
        where scope = rule.scope and name = rule.name;
    elsif most is not null then
        select most - count(*) into places
        from sqlqueue.admitted
        where scope = rule.scope and name = rule.name and key = for_key;
    end if;
    if rate is not null then
        -- GCRA (ITU-T I.371): what was admitted is paid for at the rate, a burst of it ahead.
        tokens := burst - coalesce((
            select greatest(extract(epoch from empty_until - clock_timestamp()) * rate, 0)
            from sqlqueue.bucket
            where scope = rule.scope
              and name = rule.name
              and key = coalesce(' ' || for_key, '')
        ), 0) + 0.000001;
        wait := greatest((1 - tokens) / rate, least(burst / rate / 2, 0.1));
    end if;
end
$$;
comment on function sqlqueue.room_in is
    'What a policy admits now, in jobs and in weight, of a key or of all; seconds until it is more';

create function sqlqueue.judge(rule sqlqueue.policy) returns sqlqueue.policy
language plpgsql volatile
as $$
#variable_conflict use_column
declare
    last_success bigint;
    since bigint;
    last_at timestamptz;
begin
    if rule.breaks_after is null then
        return rule;
    end if;
    perform from sqlqueue.policy
    where scope = rule.scope and name = rule.name
    for update skip locked;
    if not found then  -- it is being changed
        return rule;
    end if;
    with seen as (
        delete from sqlqueue.verdict
        where id = any (array(
            select id from sqlqueue.verdict where scope = rule.scope and name = rule.name
        ))
        returning id, at, is_failure
    ),
    success as (
        select max(id) as last from seen where not is_failure
    )
    select success.last, count(*) filter (where is_failure and id > coalesce(success.last, 0)),
        max(at)
    into last_success, since, last_at
    from seen
    cross join success
    group by success.last;
    if not found then
        return rule;
    end if;
    rule.failures := since + case when last_success is null then rule.failures else 0 end;
    if rule.failures >= rule.breaks_after
        and (rule.paused_at is null or coalesce(rule.resumes_at <= now(), false))
    then
        rule.paused_at := last_at;
        rule.paused_by := 'circuit breaker';
        rule.paused_why := rule.failures || ' failures in a row';
        rule.resumes_at := last_at + rule.breaks_for;
    end if;
    update sqlqueue.policy
    set failures = rule.failures,
        paused_at = rule.paused_at,
        paused_by = rule.paused_by,
        paused_why = rule.paused_why,
        resumes_at = rule.resumes_at
    where scope = rule.scope and name = rule.name;
    return rule;
end
$$;
comment on function sqlqueue.judge is
    'Looks at how the runs under a policy ended, and pauses it after too many failures in a row';

create function sqlqueue.take(
    rule sqlqueue.policy, for_key text, rate double precision, weight double precision
) returns void
language sql volatile
as $$
    insert into sqlqueue.bucket as bucket (scope, name, key, empty_until)
    select
        rule.scope, rule.name, coalesce(' ' || for_key, ''),
        clock_timestamp() + make_interval(secs => weight / rate)
    where rate is not null
    on conflict (scope, name, key) do update
    set empty_until = greatest(bucket.empty_until, clock_timestamp())
        + make_interval(secs => weight / rate)
$$;
comment on function sqlqueue.take is 'Takes weight out of the bucket of a rate, if there is one';

create function sqlqueue.admit(queue text, room integer)
returns table (priority smallint, moved bigint, wait double precision)
language plpgsql volatile
as $$
#variable_conflict use_column
declare
    last_flow text;
    this_flow text;
    idle_since text;
    this_task text;
    this_key text;
    of_queue sqlqueue.policy;
    of_task sqlqueue.policy;
    in_queue record;
    in_task record;
    in_queue_key record;
    in_task_key record;
    share integer;
    most double precision;
    tokens double precision;
    done record;
    priorities smallint[] := array[]::smallint[];
    soonest double precision;
begin
    if not exists (select from sqlqueue.waiting where queue = admit.queue)
        or exists (
            select
            from sqlqueue.queue
            where name = admit.queue
              and paused_at is not null
              and coalesce(resumes_at > now(), true)
        )
    then
        return;
    end if;
    select flow into last_flow
    from sqlqueue.turn
    where queue = admit.queue
    for update skip locked;
    if not found then
        -- It is locked, or not there yet. An insert would wait for whoever has inserted or changed
        -- it and not committed, so the first one is made by whoever holds the lock of its name.
        if pg_try_advisory_xact_lock(hashtextextended('sqlqueue.turn ' || admit.queue, 0)) then
            insert into sqlqueue.turn (queue)
            select admit.queue
            where not exists (select from sqlqueue.turn where queue = admit.queue)
            returning flow into last_flow;
        end if;
        if last_flow is null then  -- another worker admits
            return query select cast(null as smallint), cast(0 as bigint), 0.005::double precision;
            return;
        end if;
    end if;
    -- All that is counted from here on is counted after the row was locked, in statements of its
    -- own: one that locks and counts would see what was before it waited.
    select policy.* into of_queue
    from sqlqueue.policy
    where scope = 'queue' and name = admit.queue;
    of_queue := sqlqueue.judge(of_queue);
    in_queue := sqlqueue.room_in(of_queue, null);
    soonest := in_queue.wait;
    for visit in 1..1000 loop
        exit when room < 1 or in_queue.places < 1 or in_queue.tokens < 1;
        select flow into this_flow
        from sqlqueue.waiting
        where queue = admit.queue and flow > last_flow
        order by flow
        limit 1;
        if not found then
            exit when last_flow = '';
            last_flow := '';
            continue;
        end if;
        exit when this_flow = idle_since;  -- nothing was admitted in a whole round
        idle_since := coalesce(idle_since, this_flow);
        last_flow := this_flow;
        this_key := substr(this_flow, strpos(this_flow, ' ') + 1);
        if this_task is distinct from split_part(this_flow, ' ', 1) then
            this_task := split_part(this_flow, ' ', 1);
            select policy.* into of_task
            from sqlqueue.policy
            where scope = 'task' and name = this_task
            for update skip locked;
            of_task := sqlqueue.judge(of_task);
            in_task := sqlqueue.room_in(of_task, null);
            if this_task <> '' and of_task.name is null then  -- another worker admits of this task
                in_task.places := 0;
                in_task.wait := 0.005;
            end if;
            soonest := least(soonest, in_task.wait);
        end if;
        in_queue_key := sqlqueue.room_in(of_queue, this_key);
        in_task_key := sqlqueue.room_in(of_task, this_key);
        soonest := least(soonest, in_queue_key.wait, in_task_key.wait);
        share := coalesce((
            select weight from sqlqueue.share where queue = admit.queue and key = this_key
        ), 1);
        if not exists (
            select from sqlqueue.waiting where queue = admit.queue and flow > this_flow
        ) and not exists (
            select from sqlqueue.waiting where queue = admit.queue and flow < this_flow
        ) then
            share := room;  -- nobody else is there
        end if;
        most := least(
            room, share, in_queue.places, in_task.places, in_queue_key.places, in_task_key.places
        );
        tokens := least(
            in_queue.tokens, in_task.tokens, in_queue_key.tokens, in_task_key.tokens
        );
        continue when most < 1 or tokens < 1;
        with seen as (
            select ctid as place, rank, seq, least(weight, greatest(
                of_queue.burst, of_task.burst, of_queue.burst_per_key, of_task.burst_per_key, 1
            )) as weight
            from sqlqueue.waiting
            where queue = admit.queue and flow = this_flow
            order by rank, seq
            limit cast(most as integer)
            for update skip locked
        ),
        counted as (
            select place, sum(weight) over (order by rank, seq) as total
            from seen
        ),
        picked as (
            delete from sqlqueue.waiting
            where ctid = any (array(select place from counted where total <= tokens))
            returning job_id, due_at, run, failures, crashes, priority, queue, rank, seq, weight
        ),
        placed as (
            insert into sqlqueue.admitted (job_id, scope, name, key)
            select picked.job_id, rule.scope, rule.name, this_key
            from picked
            cross join (
                values (of_queue.scope, of_queue.name), (of_task.scope, of_task.name)
            ) as rule (scope, name)
            where rule.name is not null
        ),
        moved as (
            insert into sqlqueue.ready (
                job_id, due_at, run, failures, crashes, priority, queue, admission
            )
            select
                job_id, due_at, run, failures, crashes, priority, queue,
                case when of_queue.keeps_order or of_task.keeps_order then 2 else 1 end
            from picked
            order by rank, seq
        )
        select
            count(*) as jobs, array_agg(priority) as priorities,
            (select max(total) from counted where total <= tokens) as weight
        into done
        from picked;
        continue when done.jobs = 0;
        idle_since := null;
        priorities := priorities || done.priorities;
        room := room - done.jobs;
        in_queue.places := in_queue.places - done.jobs;
        in_task.places := in_task.places - done.jobs;
        in_queue.tokens := in_queue.tokens - done.weight;
        in_task.tokens := in_task.tokens - done.weight;
        if tokens < 'infinity' then
            perform sqlqueue.take(of_queue, null, of_queue.rate, done.weight);
            perform sqlqueue.take(of_queue, this_key, of_queue.rate_per_key, done.weight);
            perform sqlqueue.take(of_task, null, of_task.rate, done.weight);
            perform sqlqueue.take(of_task, this_key, of_task.rate_per_key, done.weight);
        end if;
    end loop;
    update sqlqueue.turn set flow = last_flow
    where queue = admit.queue and flow is distinct from last_flow;
    return query
    select admitted.priority, count(*), cast(null as double precision)
    from unnest(priorities) as admitted (priority)
    group by admitted.priority
    union all
    select null, 0, soonest
    where soonest is not null;
end
$$;
comment on function sqlqueue.admit is
    'Makes so many waiting jobs of a queue ready: flow by flow, within their limits and rates';

create function sqlqueue.gate_again(of_scope text, of_name text) returns void
language sql volatile
as $$
    with was_ready as (
        delete from sqlqueue.ready
        using sqlqueue.job
        where job.id = ready.job_id
          and ready.admission = 0
          and case of_scope when 'queue' then ready.queue else job.task end = of_name
        returning ready.job_id, ready.due_at, ready.run, ready.failures, ready.crashes,
            ready.priority, ready.queue, ready.seq
    ),
    was_waiting as (
        delete from sqlqueue.waiting
        using sqlqueue.job
        where job.id = waiting.job_id
          and case of_scope when 'queue' then waiting.queue else job.task end = of_name
        returning waiting.job_id, waiting.due_at, waiting.run, waiting.failures, waiting.crashes,
            waiting.priority, waiting.queue, waiting.seq
    ),
    loose as (
        select was_ready.* from was_ready
        union all
        select was_waiting.* from was_waiting
    ),
    held as (
        insert into sqlqueue.waiting (
            job_id, due_at, run, failures, crashes, priority, queue, flow, weight, rank
        )
        select
            loose.job_id, loose.due_at, loose.run, loose.failures, loose.crashes, loose.priority,
            loose.queue, gate.flow, coalesce(job.weight, 1),
            sqlqueue.rank(loose.due_at, loose.priority, gate.ageing)
        from loose
        join sqlqueue.job on job.id = loose.job_id
        cross join lateral sqlqueue.gate(loose.queue, job.task, job.key) as gate
        order by loose.seq
        returning job_id
    )
    insert into sqlqueue.ready (job_id, due_at, run, failures, crashes, priority, queue)
    select job_id, due_at, run, failures, crashes, priority, queue
    from loose
    where job_id not in (select job_id from held)
    order by seq
$$;
comment on function sqlqueue.gate_again is
    'Has the jobs of a queue or task wait where its policy, or the end of it, says';

create function sqlqueue.set_policy(scope text, name text, rules jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
    perform set_config('jit', 'off', true);
    if rules is null then
        delete from sqlqueue.policy where scope = set_policy.scope and name = set_policy.name;
    else
        insert into sqlqueue.policy
        select given.*
        from jsonb_populate_record(
            null::sqlqueue.policy,
            jsonb_build_object('keeps_order', false, 'failures', 0) || rules
                || jsonb_build_object('scope', set_policy.scope, 'name', set_policy.name)
        ) as given
        on conflict (scope, name) do update
        set concurrency = excluded.concurrency,
            concurrency_per_key = excluded.concurrency_per_key,
            rate = excluded.rate,
            burst = excluded.burst,
            rate_per_key = excluded.rate_per_key,
            burst_per_key = excluded.burst_per_key,
            keeps_order = excluded.keeps_order,
            ageing = excluded.ageing,
            max_waiting = excluded.max_waiting,
            breaks_after = excluded.breaks_after,
            breaks_for = excluded.breaks_for,
            failures = 0;
    end if;
    delete from sqlqueue.verdict where scope = set_policy.scope and name = set_policy.name;
    if scope = 'queue' then
        delete from sqlqueue.share where queue = set_policy.name;
        insert into sqlqueue.share (queue, key, weight)
        select set_policy.name, given.key, cast(given.value as integer)
        from jsonb_each_text(coalesce(rules -> 'shares', '{}')) as given;
    end if;
    perform sqlqueue.gate_again(scope, name);
    perform sqlqueue.note_action('set_policy', scope || ' ' || name, true);
end
$$;
comment on function sqlqueue.set_policy is
    'Sets the rules of a queue or task, by the names of columns of policy; null: it has none';

create function sqlqueue.cancel_unstarted(job_id uuid, reason text) returns boolean
language sql volatile
set enable_seqscan = off
set jit = off
as $$
    with was_scheduled as (
        delete from sqlqueue.scheduled
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes
    ),
    was_waiting as (
        delete from sqlqueue.waiting
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes
    ),
    was_ready as (
        delete from sqlqueue.ready
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes
    ),
    was_somewhere as (
        select job_id, due_at, run, failures, crashes from was_scheduled
        union all
        select job_id, due_at, run, failures, crashes from was_waiting
        union all
        select job_id, due_at, run, failures, crashes from was_ready
    ),
    left_place as (
        delete from sqlqueue.admitted
        where job_id in (select job_id from was_somewhere)
    ),
    ended as (
        insert into sqlqueue.run (
            job_id, run, ended_at, due_at, attempt, crashes, is_final, outcome, error_type, error
        )
        select
            job_id, run + 1, now(), due_at, failures + 1, crashes, true, 'cancelled', 'cancelled',
            cancel_unstarted.reason
        from was_somewhere
        returning run
    )
    select exists (select from ended)
$$;
comment on function sqlqueue.cancel_unstarted is
    'Ends a job as cancelled if it is scheduled, waiting or ready; true if it was';

create function sqlqueue.cancel_job(job_id uuid, reason text) returns boolean
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    wanted constant uuid := job_id;
begin
    -- The request is found by the worker of a job that moves while this looks, at its next beat.
    insert into sqlqueue.cancel_request (job_id, reason)
    select id, cancel_job.reason
    from sqlqueue.job
    where id = wanted
      and not exists (select from sqlqueue.run where run.job_id = wanted and is_final)
    on conflict do nothing;
    if sqlqueue.cancel_unstarted(wanted, cancel_job.reason) then
        return true;
    end if;
    perform sqlqueue.notify(concat_ws(' ', worker_id, 'cancel', job_id))
    from sqlqueue.lease
    where job_id = wanted;
    -- A job that moved while this looked is met the second time, or asked at its next move.
    return found
        or sqlqueue.cancel_unstarted(wanted, cancel_job.reason)
        or exists (
            select
            from sqlqueue.cancel_request
            where cancel_request.job_id = wanted
              and not exists (select from sqlqueue.run where run.job_id = wanted and is_final)
        );
end
$$;
comment on function sqlqueue.cancel_job is
    'Ends a job as cancelled, or tells a running one to stop; false if it had ended';

create function sqlqueue.cancel(job_id uuid, reason text default 'cancelled by request')
returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    is_done constant boolean := sqlqueue.cancel_job(job_id, reason);
begin
    perform sqlqueue.note_action('cancel', cast(job_id as text), is_done);
    return is_done;
end
$$;
comment on function sqlqueue.cancel is
    'Cancels a job for an operator: see cancel_job';

create function sqlqueue.is_held(claim sqlqueue.unique_claim) returns boolean
language sql stable
as $$
    select coalesce(claim.lasts_until > now(), false)
        or exists (
            select
            from (
                select job_id, run from sqlqueue.scheduled
                union all
                select job_id, run from sqlqueue.waiting
                union all
                select job_id, run from sqlqueue.ready
            ) as unstarted
            where job_id = claim.job_id
              and (run = 0 or not claim.ends_at_start)
        )
        or (
            not claim.ends_at_start
            and exists (select from sqlqueue.lease where job_id = claim.job_id)
        )
$$;
comment on function sqlqueue.is_held is 'Whether the job that took a unique key still holds it';

create function sqlqueue.take_keys(
    keys text[],
    ids uuid[],
    on_conflict text,
    until_started boolean,
    period interval,
    delay interval,
    longest interval
) returns uuid[]
language plpgsql volatile
set lock_timeout = '1s'
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    holders uuid[] := ids;
    place integer;
    holder sqlqueue.unique_claim;
    is_theirs boolean;
begin
    -- In order of the keys, so that two who take several never wait for one another.
    for place in select n from generate_subscripts(keys, 1) as n order by keys[n] loop
        loop
            insert into sqlqueue.unique_claim (key, job_id, lasts_until, ends_at_start)
            values (keys[place], ids[place], now() + period, until_started)
            on conflict (key) do nothing;
            exit when found;
            -- Its job may end while nobody looks, so a row alone says nothing; and what is read
            -- before the row is locked is true only of a job that holds it.
            select unique_claim.* into holder from sqlqueue.unique_claim where key = keys[place];
            is_theirs := holder.job_id <> ids[place]
                and (holder.job_id = any (ids) or sqlqueue.is_held(holder));
            if is_theirs and on_conflict in ('skip', 'raise') then
                holders[place] := holder.job_id;
                exit;
            end if;
            select unique_claim.* into holder
            from sqlqueue.unique_claim
            where key = keys[place]
            for update;
            continue when not found;
            is_theirs := holder.job_id <> ids[place]
                and (holder.job_id = any (ids) or sqlqueue.is_held(holder));
            if is_theirs and on_conflict = 'debounce' then
                update sqlqueue.scheduled
                set due_at = least(now() + delay, holder.taken_at + longest)
                where job_id = holder.job_id and run = 0;
            elsif is_theirs and on_conflict = 'replace' and holder.job_id <> all (ids) then
                perform sqlqueue.cancel_job(holder.job_id, 'replaced');
                is_theirs := false;
            end if;
            if is_theirs then
                holders[place] := holder.job_id;
            else
                update sqlqueue.unique_claim
                set job_id = ids[place],
                    taken_at = now(),
                    lasts_until = now() + period,
                    ends_at_start = until_started
                where key = keys[place];
            end if;
            exit;
        end loop;
    end loop;
    return holders;
exception
    when lock_not_available then
        return null;
end
$$;
comment on function sqlqueue.take_keys is
    'Takes unique keys for jobs; returns the holder of each, null if a stranger is taking one';

create function sqlqueue.forget_keys() returns setof text
language sql volatile
set enable_seqscan = off
as $$
    with forgotten as (
        delete from sqlqueue.unique_claim
        where key in (
            select key
            from sqlqueue.unique_claim
            where taken_at < now() - (select retention from sqlqueue.setting)
              and not sqlqueue.is_held(unique_claim)
            order by taken_at
            limit 10000
            for update skip locked
        )
        returning key
    )
    select 'forgot ' || count(*) || ' unique keys' from forgotten having count(*) > 0
$$;
comment on function sqlqueue.forget_keys is
    'Removes unique keys that nobody holds and nobody has taken for as long as history is kept';

create function sqlqueue.retry_job(job_id uuid) returns boolean
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    given sqlqueue.job;
    last_run integer;
begin
    select job.* into given from sqlqueue.job where id = retry_job.job_id;
    update sqlqueue.run
    set is_final = false
    where run.job_id = given.id
      and is_final
      and outcome not in ('succeeded', 'expired')  -- it would expire again
    returning run into last_run;
    if not found then
        return false;
    end if;
    if given.unique_key is not null
        and coalesce(sqlqueue.take_keys(
            array[given.unique_key], array[given.id], 'skip', false, null, null, null
        ) <> array[given.id], true)
    then
        update sqlqueue.run set is_final = true
        where run.job_id = given.id and run = last_run;
        return false;
    end if;
    delete from sqlqueue.cancel_request where cancel_request.job_id = given.id;
    insert into sqlqueue.waiting (
        job_id, due_at, run, priority, queue, flow, weight, rank
    )
    select
        given.id, now(), last_run, given.priority, given.queue, flow, coalesce(given.weight, 1),
        sqlqueue.rank(now(), given.priority, ageing)
    from sqlqueue.gate(given.queue, given.task, given.key);
    if not found then
        insert into sqlqueue.ready (job_id, due_at, run, priority, queue)
        values (given.id, now(), last_run, given.priority, given.queue);
    end if;
    perform sqlqueue.ring(given.queue, cast(given.priority as text));
    return true;
end
$$;
comment on function sqlqueue.retry_job is
    'Makes a failed or cancelled job ready again, with all its attempts; true if it was one';

create function sqlqueue.retry(job_id uuid) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    is_done constant boolean := sqlqueue.retry_job(job_id);
begin
    perform sqlqueue.note_action('retry', cast(job_id as text), is_done);
    return is_done;
end
$$;
comment on function sqlqueue.retry is
    'Retries a job for an operator: see retry_job';

create function sqlqueue.pause(
    scope text,
    name text,
    is_paused boolean default true,
    by text default null,
    why text default null,
    lasts interval default null
) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    since constant timestamptz := case when is_paused then now() end;
begin
    if scope = 'queue' then
        insert into sqlqueue.queue (name, paused_at, paused_by, paused_why, resumes_at)
        values (pause.name, since, by, why, now() + lasts)
        on conflict (name) do update
        set paused_at = excluded.paused_at,
            paused_by = excluded.paused_by,
            paused_why = excluded.paused_why,
            resumes_at = excluded.resumes_at;
        update sqlqueue.policy
        set failures = 0, paused_at = null, paused_by = null, paused_why = null, resumes_at = null
        where scope = 'queue' and name = pause.name and not is_paused;
    elsif scope = 'schedule' then
        update sqlqueue.schedule
        set paused_at = since,
            paused_by = by,
            paused_why = why,
            resumes_at = now() + lasts,
            next_at = null
        where schedule.name = pause.name;
    else
        insert into sqlqueue.policy (scope, name, paused_at, paused_by, paused_why, resumes_at)
        values (pause.scope, pause.name, since, by, why, now() + lasts)
        on conflict (scope, name) do update
        set paused_at = excluded.paused_at,
            paused_by = excluded.paused_by,
            paused_why = excluded.paused_why,
            resumes_at = excluded.resumes_at,
            failures = 0;
        perform sqlqueue.gate_again(scope, pause.name);
    end if;
    perform sqlqueue.note_action(
        case when is_paused then 'pause' else 'resume' end,
        scope || ' ' || name,
        scope <> 'schedule' or exists (select from sqlqueue.schedule where name = pause.name)
    );
end
$$;
comment on function sqlqueue.pause is
    'Pauses a queue, task or schedule, for a time or until it is called with is_paused false';

revoke all on function
    sqlqueue.gated, sqlqueue.gate, sqlqueue.rank, sqlqueue.room_in, sqlqueue.judge, sqlqueue.take,
    sqlqueue.admit, sqlqueue.gate_again, sqlqueue.set_policy, sqlqueue.cancel_unstarted,
    sqlqueue.cancel_job, sqlqueue.cancel, sqlqueue.is_held, sqlqueue.take_keys,
    sqlqueue.forget_keys, sqlqueue.retry_job, sqlqueue.retry, sqlqueue.pause
from public;
"""


VIEWS = r"""
create view sqlqueue.queues as
select
    coalesce(level.queue, queue.name) as queue,
    coalesce(level.ready, 0) as ready,
    coalesce(level.waiting, 0) as waiting,
    coalesce(level.scheduled, 0) as scheduled,
    coalesce(level.running, 0) as running,
    level.oldest_wait, policy.concurrency, policy.rate,
    pause.paused_at, pause.paused_by, pause.paused_why, pause.resumes_at
from (
    select
        queue,
        count(*) filter (where state = 'ready') as ready,
        count(*) filter (where state = 'waiting') as waiting,
        count(*) filter (where state = 'scheduled') as scheduled,
        count(*) filter (where state = 'running') as running,
        max(waited) filter (where state in ('ready', 'waiting')) as oldest_wait
    from sqlqueue.live
    group by queue
) as level
full join sqlqueue.queue on queue.name = level.queue
left join sqlqueue.policy
    on policy.scope = 'queue'
    and policy.name = coalesce(level.queue, queue.name)
left join lateral (
    select paused_at, paused_by, paused_why, resumes_at
    from (
        select name, paused_at, paused_by, paused_why, resumes_at
        from sqlqueue.queue
        union all
        select name, paused_at, paused_by, paused_why, resumes_at
        from sqlqueue.policy
        where scope = 'queue'
    ) as told
    where name = coalesce(level.queue, queue.name)
      and paused_at is not null
      and coalesce(resumes_at > now(), true)
    order by resumes_at desc nulls first
    limit 1
) as pause on true;

comment on view sqlqueue.queues
    is 'Queues that hold jobs which have not ended, or that were ever paused';
comment on column sqlqueue.queues.queue
    is 'name of the queue';
comment on column sqlqueue.queues.ready
    is 'jobs that may run now';
comment on column sqlqueue.queues.waiting
    is 'jobs that wait under a policy';
comment on column sqlqueue.queues.scheduled
    is 'jobs that may run later';
comment on column sqlqueue.queues.running
    is 'jobs that run';
comment on column sqlqueue.queues.oldest_wait
    is 'of those that are ready or waiting';
comment on column sqlqueue.queues.concurrency
    is 'jobs that may run at a time; null: no limit';
comment on column sqlqueue.queues.rate
    is 'weight admitted in a second; null: no limit';
comment on column sqlqueue.queues.paused_at
    is 'since when it is paused; null: it is not';
comment on column sqlqueue.queues.paused_by
    is 'who paused it';
comment on column sqlqueue.queues.paused_why
    is 'why';
comment on column sqlqueue.queues.resumes_at
    is 'when the pause ends by itself; null: never';
"""


def upgrade() -> None:
    for sql in (TABLES, FUNCTIONS, VIEWS):
        op.execute(in_schema(sql))


def downgrade() -> None:
    op.execute(
        in_schema(
            "drop view sqlqueue.queues;"
            "drop function sqlqueue.pause, sqlqueue.retry, sqlqueue.retry_job,"
            " sqlqueue.forget_keys, sqlqueue.take_keys, sqlqueue.is_held,"
            " sqlqueue.cancel, sqlqueue.cancel_job, sqlqueue.cancel_unstarted,"
            " sqlqueue.set_policy, sqlqueue.gate_again, sqlqueue.admit, sqlqueue.take,"
            " sqlqueue.judge, sqlqueue.room_in, sqlqueue.rank, sqlqueue.gate, sqlqueue.gated;"
            "drop table sqlqueue.policy, sqlqueue.share, sqlqueue.bucket, sqlqueue.turn,"
            " sqlqueue.admitted, sqlqueue.verdict, sqlqueue.unique_claim;"
        )
    )


def in_schema(sql: str) -> str:
    """Put the schema of this installation in the place of the name `sqlqueue`."""
    schema = op.get_context().version_table_schema
    return sql.replace("sqlqueue.", f"{schema}.").replace("'sqlqueue'", f"'{schema}'")
