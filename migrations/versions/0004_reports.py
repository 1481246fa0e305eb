"""Add what is reported: the flow of jobs, causes of failures, health, and verbs for many jobs.

adds    the tables flow, total, depth and mute, their views and functions; columns of run, worker
        and setting; an index by time on job
locks   job against enqueuing, while it is read once: about a second for a million jobs
time    by the number of jobs, and of those that failed; gives up after lock_timeout (2 s)
undo    drops them, and what was counted
"""

from alembic import op

revision = "0004"
down_revision = "0003"

TABLES = r"""
alter table sqlqueue.run add column queue text;
alter table sqlqueue.run add column task text;
alter table sqlqueue.run add column fingerprint text;
comment on column sqlqueue.run.queue
    is 'the queue it was claimed from, if it did not succeed';
comment on column sqlqueue.run.task
    is 'its task, if it did not succeed';
comment on column sqlqueue.run.fingerprint
    is 'the same for failures with one cause, see the function fingerprint';

alter table sqlqueue.worker add column told text;
comment on column sqlqueue.worker.told
    is 'drain or stop: told by an operator; drains, stops: it knows; left: it ended in good order';

alter table sqlqueue.worker add column rss_bytes bigint;
alter table sqlqueue.worker add column cpu_seconds double precision;
alter table sqlqueue.worker add column cpu double precision;
alter table sqlqueue.worker add column jobs_done bigint;
comment on column sqlqueue.worker.rss_bytes
    is 'memory of its process';
comment on column sqlqueue.worker.cpu_seconds
    is 'processor time of its process since it started';
comment on column sqlqueue.worker.cpu
    is 'cores that its process used between its last two beats';
comment on column sqlqueue.worker.jobs_done
    is 'runs that have ended in it';

alter table sqlqueue.setting add column observed_at timestamptz;
comment on column sqlqueue.setting.observed_at
    is 'the minute in which levels were sampled last';

create index job_created on sqlqueue.job using brin (created_at)
    with (pages_per_range = 32, autosummarize = on);

create table sqlqueue.flow (
    id bigint generated always as identity,
    at timestamptz not null,
    step text default 'open' not null,
    queue text not null,
    task text not null,
    enqueued bigint default 0 not null,
    started bigint default 0 not null,
    succeeded bigint default 0 not null,
    failed bigint default 0 not null,
    retried bigint default 0 not null,
    cancelled bigint default 0 not null,
    waited bigint[],
    ran bigint[],
    primary key (id),
    check (step in ('open', 'minute', 'hour'))
);
create index flow_at on sqlqueue.flow (at);
create unique index flow_once on sqlqueue.flow (step, at, queue, task) where step <> 'open';
comment on table sqlqueue.flow
    is 'How many jobs came and went in a time: added to by workers, folded by upkeep';
comment on column sqlqueue.flow.id
    is 'their order';
comment on column sqlqueue.flow.at
    is 'beginning of the minute or hour, by the clock of the database';
comment on column sqlqueue.flow.step
    is 'open: to be folded into a minute; minute, kept for two days; hour, kept as long as history';
comment on column sqlqueue.flow.queue
    is 'the queue';
comment on column sqlqueue.flow.task
    is 'the task';
comment on column sqlqueue.flow.enqueued
    is 'jobs enqueued';
comment on column sqlqueue.flow.started
    is 'runs that ended';
comment on column sqlqueue.flow.succeeded
    is 'jobs that succeeded';
comment on column sqlqueue.flow.failed
    is 'jobs that failed, also by timeout or crash, or expired';
comment on column sqlqueue.flow.retried
    is 'runs that failed and left attempts';
comment on column sqlqueue.flow.cancelled
    is 'jobs that were cancelled';
comment on column sqlqueue.flow.waited
    is 'histogram of waits of the runs begun; bucket i, from 0, ends at 2^(i/2) ms';
comment on column sqlqueue.flow.ran
    is 'histogram of how long the runs that ended took';

create table sqlqueue.total (
    queue text not null,
    task text not null,
    enqueued bigint default 0 not null,
    started bigint default 0 not null,
    succeeded bigint default 0 not null,
    failed bigint default 0 not null,
    retried bigint default 0 not null,
    cancelled bigint default 0 not null,
    waited bigint[],
    ran bigint[],
    primary key (queue, task)
);
comment on table sqlqueue.total
    is 'The sums of all that was ever folded: they never fall';
comment on column sqlqueue.total.queue
    is 'the queue';
comment on column sqlqueue.total.task
    is 'the task';
comment on column sqlqueue.total.enqueued
    is 'jobs enqueued';
comment on column sqlqueue.total.started
    is 'runs that ended';
comment on column sqlqueue.total.succeeded
    is 'jobs that succeeded';
comment on column sqlqueue.total.failed
    is 'jobs that failed, also by timeout or crash, or expired';
comment on column sqlqueue.total.retried
    is 'runs that failed and left attempts';
comment on column sqlqueue.total.cancelled
    is 'jobs that were cancelled';
comment on column sqlqueue.total.waited
    is 'histogram of how long the runs that ended had waited';
comment on column sqlqueue.total.ran
    is 'histogram of how long the runs that ended took';

create table sqlqueue.depth (
    at timestamptz not null,
    queue text not null,
    ready bigint not null,
    waiting bigint not null,
    scheduled bigint not null,
    running bigint not null,
    oldest_wait interval,
    primary key (at, queue)
);
comment on table sqlqueue.depth
    is 'The level of each queue, sampled each minute; of old days each hour';
comment on column sqlqueue.depth.at
    is 'when: beginning of the minute';
comment on column sqlqueue.depth.queue
    is 'the queue';
comment on column sqlqueue.depth.ready
    is 'jobs that might run then, at most 10,001 of a priority';
comment on column sqlqueue.depth.waiting
    is 'jobs that waited under a policy';
comment on column sqlqueue.depth.scheduled
    is 'jobs that might run later';
comment on column sqlqueue.depth.running
    is 'jobs that ran';
comment on column sqlqueue.depth.oldest_wait
    is 'of those at the heads of its lanes';

create table sqlqueue.mute (
    fingerprint text not null,
    until timestamptz not null,
    primary key (fingerprint)
);
comment on table sqlqueue.mute
    is 'Causes of failures that need no attention for a while';
comment on column sqlqueue.mute.fingerprint
    is 'the cause';
comment on column sqlqueue.mute.until
    is 'when it needs attention again';
"""

FUNCTIONS = r"""
create function sqlqueue.hist_add(one bigint[], other bigint[]) returns bigint[]
language sql immutable parallel safe
as $$
    select case
        when one is null then other
        when other is null then one
        else (
            select array_agg(coalesce(a, 0) + coalesce(b, 0) order by place)
            from unnest(one, other) with ordinality as pair (a, b, place)
        )
    end
$$;
comment on function sqlqueue.hist_add is 'Adds two histograms; null: an empty one';

create aggregate sqlqueue.hist_sum(bigint[]) (
    sfunc = sqlqueue.hist_add, stype = bigint[], combinefunc = sqlqueue.hist_add, parallel = safe
);
comment on aggregate sqlqueue.hist_sum(bigint[]) is 'The sum of histograms: that of all values';

create function sqlqueue.hist_quantile(hist bigint[], q double precision) returns interval
language sql immutable parallel safe
as $$
    -- the end of the bucket that holds the value: at most one bucket too high
    select make_interval(secs => power(2, (place - 1) / 2.0) / 1000)
    from (
        select
            place,
            sum(number) over (order by place) as so_far,
            sum(number) over () as total
        from unnest(hist) with ordinality as bucket (number, place)
    ) as counted
    where so_far >= greatest(ceil(total * q), 1)
    order by place
    limit 1
$$;
comment on function sqlqueue.hist_quantile is
    'A quantile of a histogram, from 0 to 1; null if it is empty';

create function sqlqueue.frame(traceback text) returns text
language sql immutable parallel safe
as $$
    select concat_ws(' ', regexp_replace(found[1], '^.*[/\\]', ''), found[2])
    from regexp_matches(traceback, 'File "([^"\n]+)", line \d+, in (\S+)', 'g')
        with ordinality as frame (found, place)
    order by found[1] ~ '[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python\d|^<', place desc
    limit 1
$$;
comment on function sqlqueue.frame is
    'File and function of the innermost frame of the application''s own code';

create function sqlqueue.fingerprint(
    task text, outcome text, error_type text, traceback text
) returns text
language sql immutable parallel safe
as $$
    -- no message and no line number: they change with data and with each release
    select left(md5(case
        when outcome = 'failed'
            then concat_ws(' ', task, error_type, sqlqueue.frame(left(traceback, 100000)))
        else concat_ws(' ', task, outcome)
    end), 12)
$$;
comment on function sqlqueue.fingerprint is
    'The same for runs of a task that failed by the same error in the same place';

create function sqlqueue.count_runs(counts jsonb) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
begin
    insert into sqlqueue.flow (
        at, queue, task, started, succeeded, failed, retried, cancelled, waited, ran
    )
    select
        date_trunc('minute', now(), 'UTC'), queue, task, sum(number),
        coalesce(sum(number) filter (where what = 'succeeded'), 0),
        coalesce(sum(number) filter (where what = 'failed'), 0),
        coalesce(sum(number) filter (where what = 'retried'), 0),
        coalesce(sum(number) filter (where what = 'cancelled'), 0),
        sqlqueue.hist_sum(array_fill(cast(0 as bigint), array[waited]) || number),
        sqlqueue.hist_sum(array_fill(cast(0 as bigint), array[ran]) || number)
            filter (where ran is not null)
    from (
        select
            row ->> 0 as queue, row ->> 1 as task,
            case
                when row ->> 2 not in ('failed', 'timed_out', 'crashed', 'expired') then row ->> 2
                when cast(row ->> 3 as boolean) then 'failed'
                else 'retried'
            end as what,
            cast(row ->> 4 as integer) as waited, cast(row ->> 5 as integer) as ran,
            cast(row ->> 6 as bigint) as number
        from jsonb_array_elements(counts) as given (row)
    ) as told
    group by queue, task;
    perform sqlqueue.observe();
end
$$;
comment on function sqlqueue.count_runs is
    'Adds what a worker has counted; once a minute, whoever comes first samples and folds';

create function sqlqueue.observe() returns void
language plpgsql volatile
as $$
declare
    this constant timestamptz := date_trunc('minute', now(), 'UTC');
    last timestamptz;
begin
    select observed_at into last from sqlqueue.setting for update skip locked;
    if not found or last >= this then
        return;
    end if;
    update sqlqueue.setting set observed_at = this;
    insert into sqlqueue.depth (at, queue, ready, waiting, scheduled, running, oldest_wait)
    select this, queue, ready, waiting, scheduled, running, oldest_wait
    from sqlqueue.queues
    on conflict do nothing;
    -- The minute that has ended, and again the one five minutes ago: of those who commit late.
    perform sqlqueue.count_enqueued(minute)
    from generate_series(
        greatest(coalesce(last, this), this - interval '1 hour') - interval '1 minute',
        this - interval '1 minute',
        interval '1 minute'
    ) as minute;
    perform sqlqueue.count_enqueued(this - interval '6 minutes');
    perform sqlqueue.fold(this);
end
$$;
comment on function sqlqueue.observe is
    'Once a minute: samples the levels, counts what was enqueued, folds and forgets';

create function sqlqueue.count_enqueued(minute timestamptz) returns void
language sql volatile
as $$
    insert into sqlqueue.flow (at, queue, task, enqueued)
    select minute, counted.queue, counted.task, counted.jobs - coalesce(known.jobs, 0)
    from (
        select queue, task, count(*) as jobs
        from sqlqueue.job
        where created_at >= minute and created_at < minute + interval '1 minute'
        group by queue, task
    ) as counted
    left join lateral (
        select sum(enqueued) as jobs
        from sqlqueue.flow
        where at = minute
          and queue = counted.queue
          and task = counted.task
          and step <> 'hour'
    ) as known on true
    where counted.jobs > coalesce(known.jobs, 0)
$$;
comment on function sqlqueue.count_enqueued is
    'Counts the jobs that were enqueued in a minute and have not been counted';

create function sqlqueue.fold(this timestamptz) returns void
language plpgsql volatile
as $$
declare
    this_hour constant timestamptz := date_trunc('hour', this - interval '10 minutes', 'UTC');
    kept_until constant timestamptz := date_trunc('hour', this, 'UTC') - interval '2 days';
begin
    with open as (
        delete from sqlqueue.flow
        where step = 'open' and at < this
        returning at, queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited,
            ran
    ),
    added as (
        insert into sqlqueue.total as total (
            queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited, ran
        )
        select
            queue, task, sum(enqueued), sum(started), sum(succeeded), sum(failed), sum(retried),
            sum(cancelled), sqlqueue.hist_sum(waited), sqlqueue.hist_sum(ran)
        from open
        group by queue, task
        on conflict (queue, task) do update
        set enqueued = total.enqueued + excluded.enqueued,
            started = total.started + excluded.started,
            succeeded = total.succeeded + excluded.succeeded,
            failed = total.failed + excluded.failed,
            retried = total.retried + excluded.retried,
            cancelled = total.cancelled + excluded.cancelled,
            waited = sqlqueue.hist_add(total.waited, excluded.waited),
            ran = sqlqueue.hist_add(total.ran, excluded.ran)
    )
    insert into sqlqueue.flow as flow (
        at, step, queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited, ran
    )
    select
        at, 'minute', queue, task, sum(enqueued), sum(started), sum(succeeded), sum(failed),
        sum(retried), sum(cancelled), sqlqueue.hist_sum(waited), sqlqueue.hist_sum(ran)
    from open
    group by at, queue, task
    on conflict (step, at, queue, task) where step <> 'open' do update
    set enqueued = flow.enqueued + excluded.enqueued,
        started = flow.started + excluded.started,
        succeeded = flow.succeeded + excluded.succeeded,
        failed = flow.failed + excluded.failed,
        retried = flow.retried + excluded.retried,
        cancelled = flow.cancelled + excluded.cancelled,
        waited = sqlqueue.hist_add(flow.waited, excluded.waited),
        ran = sqlqueue.hist_add(flow.ran, excluded.ran);
    -- Hours that have ended ten minutes ago, and have not been summed.
    insert into sqlqueue.flow (
        at, step, queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited, ran
    )
    select
        hour, 'hour', queue, task, sum(enqueued), sum(started), sum(succeeded), sum(failed),
        sum(retried), sum(cancelled), sqlqueue.hist_sum(waited), sqlqueue.hist_sum(ran)
    from generate_series(kept_until, this_hour - interval '1 hour', interval '1 hour') as hour
    join sqlqueue.flow on at >= hour and at < hour + interval '1 hour' and step = 'minute'
    where not exists (
        select from sqlqueue.flow as summed where summed.step = 'hour' and summed.at = hour
    )
    group by hour, queue, task;
    delete from sqlqueue.flow
    where (step = 'minute' and at < kept_until)
       or at < now() - (select retention from sqlqueue.setting);
    delete from sqlqueue.depth
    where (at < kept_until and at <> date_trunc('hour', at, 'UTC'))
       or at < now() - (select retention from sqlqueue.setting);
    delete from sqlqueue.mute where until < now();
end
$$;
comment on function sqlqueue.fold is
    'Folds what workers have added into minutes, totals and hours; forgets what is old';

create or replace function sqlqueue.rescue(batch integer, seen_dead bigint) returns table (
    job_id text, run integer, worker_id bigint, is_last boolean
)
language sql volatile
as $$
    -- From here on such a worker can neither beat nor claim, and its leases are orphans.
    update sqlqueue.worker
    set died_at = now()
    where id = any (array(
        select id
        from sqlqueue.worker
        where died_at is null
          and (heartbeat_at < now() - ttl or id = rescue.seen_dead)
        for update skip locked
    ));
    with orphan as materialized (
        select
            held.job_id, held.run, held.worker_id, held.queue, job.task,
            coalesce(held.crashes + 1 >= job.max_crashes, true) as is_last
        from sqlqueue.worker
        cross join lateral (  -- never the other way round, which reads every lease
            select job_id, run, worker_id, crashes, queue
            from sqlqueue.lease
            where worker_id = worker.id
            limit rescue.batch
            for update skip locked
        ) as held
        left join sqlqueue.job on job.id = held.job_id
        where worker.died_at > now() - interval '10 minutes'  -- others are dug up by tidy
        limit rescue.batch
    ),
    counted as (
        insert into sqlqueue.flow (at, queue, task, failed, retried)
        select
            date_trunc('minute', now(), 'UTC'), queue, task, count(*) filter (where is_last),
            count(*) filter (where not is_last)
        from orphan
        where task is not null
        group by queue, task
    )
    select cast(job_id as text), run, worker_id, is_last
    from orphan
$$;

create or replace function sqlqueue.cancel_unstarted(job_id uuid, reason text) returns boolean
language sql volatile
set enable_seqscan = off
set jit = off
as $$
    with was_scheduled as (
        delete from sqlqueue.scheduled
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes, queue
    ),
    was_waiting as (
        delete from sqlqueue.waiting
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes, queue
    ),
    was_ready as (
        delete from sqlqueue.ready
        where job_id = cancel_unstarted.job_id
        returning job_id, due_at, run, failures, crashes, queue
    ),
    was_somewhere as (
        select job_id, due_at, run, failures, crashes, queue from was_scheduled
        union all
        select job_id, due_at, run, failures, crashes, queue from was_waiting
        union all
        select job_id, due_at, run, failures, crashes, queue from was_ready
    ),
    left_place as (
        delete from sqlqueue.admitted
        where job_id in (select job_id from was_somewhere)
    ),
    counted as (
        insert into sqlqueue.flow (at, queue, task, cancelled)
        select date_trunc('minute', now(), 'UTC'), was_somewhere.queue, job.task, 1
        from was_somewhere
        join sqlqueue.job on job.id = was_somewhere.job_id
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

create function sqlqueue.held(job_ids uuid[], runs integer[]) returns table (job_id text)
language sql stable
as $$
    select cast(asked.job_id as text)
    from unnest(held.job_ids, held.runs) as asked (job_id, run)
    cross join lateral (  -- never the other way round, which reads every lease
        select run
        from sqlqueue.lease
        where lease.job_id = asked.job_id and lease.run = asked.run
        limit 1
    ) as lease
$$;
comment on function sqlqueue.held is 'Those of some runs that hold their lease';

create function sqlqueue.job_states(job_ids uuid[], even_live boolean[]) returns table (
    id text, queue text, task text, state text, run integer, attempt integer,
    created_at timestamptz, due_at timestamptz, started_at timestamptz, ended_at timestamptz,
    progress real, note text, result text, error_type text, error text, traceback text
)
language sql stable
as $$
    select
        cast(asked.id as text), job.queue, job.task, job.state, job.run, job.attempt,
        job.created_at, job.due_at, job.started_at, job.ended_at, job.progress, job.note,
        cast(job.result as text), job.error_type, job.error, job.traceback
    from unnest(job_states.job_ids, job_states.even_live) as asked (id, even_live)
    left join lateral (  -- a job that is found where it lives is looked for no further
        select
            queue, task, state, run, attempt, created_at, due_at, started_at, ended_at, progress,
            note, result, error_type, error, traceback
        from sqlqueue.jobs
        where jobs.id = asked.id
        limit 1
    ) as job on true
    where asked.even_live or job.state is null or job.ended_at is not null
$$;
comment on function sqlqueue.job_states is
    'Jobs that have ended, others where even_live says so; nulls for what is no job';

create function sqlqueue.keep_lines(lines json) returns setof integer
language sql volatile
as $$
    insert into sqlqueue.log (
        job_id, run, seq, at, level, logger, source, message, fields, progress
    )
    select
        job_id, run, seq, clock_timestamp() - make_interval(secs => greatest(age, 0)), level,
        logger, source, message, fields, progress
    from json_to_recordset(keep_lines.lines) as line (
        job_id uuid, run integer, seq integer, age double precision, level text, logger text,
        source text, message text, fields jsonb, progress real
    )
    on conflict (job_id, run, seq) do nothing  -- after a commit whose outcome was not known
    returning seq
$$;
comment on function sqlqueue.keep_lines is 'Keeps lines that runs have said';

create function sqlqueue.unknown_since(job_id uuid) returns double precision
language sql stable
as $$
    select cast(coalesce(extract(epoch from now() - min(ended_at)), 0) as double precision)
    from sqlqueue.run
    where run.job_id = unknown_since.job_id
      and outcome = 'snoozed'
      and error_type = 'unknown_task'
$$;
comment on function sqlqueue.unknown_since is
    'Seconds that a job has waited for a worker that knows its task';

create function sqlqueue.beat(worker bigint, usage double precision[]) returns setof text
language sql volatile
as $$
    with was as (
        select id, told
        from sqlqueue.worker
        where id = beat.worker
          and died_at is null
          and heartbeat_at > now() - ttl
        for update
    )
    update sqlqueue.worker
    set heartbeat_at = now(),
        told = case was.told when 'drain' then 'drains' when 'stop' then 'stops' else was.told end,
        rss_bytes = coalesce(cast((beat.usage)[1] as bigint), rss_bytes),
        cpu = coalesce(
            ((beat.usage)[2] - cpu_seconds)
                / nullif(extract(epoch from now() - heartbeat_at), 0),
            cpu
        ),
        cpu_seconds = coalesce((beat.usage)[2], cpu_seconds),
        jobs_done = coalesce(cast((beat.usage)[3] as bigint), jobs_done)
    from was
    where worker.id = was.id
    returning coalesce(was.told, '-')
$$;
comment on function sqlqueue.beat is
    'A sign of life of a worker; returns what it was told since the last, no row if it is dead';

create function sqlqueue.unregister(worker bigint) returns setof bigint
language sql volatile
as $$
    update sqlqueue.worker
    set died_at = now(), told = 'left'
    where worker.id = unregister.worker
    returning id
$$;
comment on function sqlqueue.unregister is 'Says that a worker has stopped';

create function sqlqueue.note(verb text, target text, affected bigint, skipped bigint)
returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into sqlqueue.action (actor, role, origin, verb, target, affected, skipped)
    select
        coalesce(nullif(current_setting('sqlqueue.actor', true), ''), session_user),
        session_user,
        coalesce(
            nullif(current_setting('sqlqueue.origin', true), ''),
            nullif(current_setting('application_name'), '')
        ),
        note.verb, left(note.target, 1000), note.affected, note.skipped
$$;
comment on function sqlqueue.note is
    'Writes down what an operator did with many jobs by the function change';

create function sqlqueue.change(verb text, ids uuid[], how jsonb default '{}') returns uuid[]
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
    done uuid[] := array[]::uuid[];
    one uuid;
    place integer := 0;
    is_done boolean;
begin
    if verb not in ('retry', 'cancel', 'discard', 'delete', 'run_now', 'move') then
        raise exception 'sqlqueue.change: there is no verb %', verb
            using errcode = 'invalid_parameter_value';
    end if;
    if how ->> 'queue' !~ '^[A-Za-z0-9_.:-]{1,100}$' then
        raise exception 'sqlqueue.change: queue is no name'
            using errcode = 'invalid_parameter_value';
    end if;
    if cast(how ->> 'priority' as integer) not between -100 and 100 then
        raise exception 'sqlqueue.change: priority must be from -100 to 100'
            using errcode = 'invalid_parameter_value';
    end if;
    foreach one in array ids loop
        -- Who changes the same job waits here for nobody: it is skipped.
        if not pg_try_advisory_xact_lock(hashtextextended('sqlqueue.job ' || one, 0)) then
            continue;
        end if;
        is_done := case verb
            when 'retry' then sqlqueue.retry_job(one)
            when 'cancel' then sqlqueue.cancel_job(
                one, coalesce(how ->> 'reason', 'cancelled by request')
            )
            when 'discard' then sqlqueue.discard_job(one)
            when 'delete' then sqlqueue.delete_job(one)
            when 'run_now' then sqlqueue.hurry_job(one)
            else sqlqueue.move_job(one, how ->> 'queue', cast(how ->> 'priority' as integer))
        end;
        if is_done and how ? 'spread' then
            perform sqlqueue.put_off(one, cast(how ->> 'spread' as interval) * place
                / greatest(coalesce(cast(how ->> 'of' as integer), cardinality(ids)), 1));
        end if;
        if is_done then
            done := done || one;
            place := place + 1;
        end if;
    end loop;
    return done;
end
$$;
comment on function sqlqueue.change is
    'Does a verb to jobs that are in a state for it, and returns which those were';

create function sqlqueue.edit(job uuid, args jsonb) returns uuid
language plpgsql volatile
as $$
declare
    old record;
    verb text;
    made uuid;
begin
    select * into old from sqlqueue.jobs where jobs.id = edit.job;
    if old.state <> 'cancelled' then
        verb := case old.state when 'failed' then 'discard' else 'cancel' end;
        if cardinality(sqlqueue.change(verb, array[edit.job])) = 0 then
            return null;
        end if;
    end if;
    made := sqlqueue.enqueue(
        old.task, edit.args, queue => old.queue, priority => cast(old.priority as integer),
        timeout => old.timeout, attempts => cast(old.attempts as integer), tags => old.tags,
        description => old.description, key => old.key,
        headers => coalesce(old.headers, '{}') || jsonb_build_object('edited_from', edit.job)
    );
    perform sqlqueue.note('edit', edit.job || ' as ' || made, 1, 0);
    return made;
end
$$;
comment on function sqlqueue.edit is
    'Enqueues a job that failed anew with other arguments, and discards it; null if it succeeded';

create function sqlqueue.discard_job(id uuid) returns boolean
language sql volatile
as $$
    with last as (
        update sqlqueue.run
        set is_final = false
        where job_id = discard_job.id
          and is_final
          and outcome in ('failed', 'timed_out', 'crashed')
        returning job_id, run, due_at, attempt, crashes
    ),
    discarded as (
        insert into sqlqueue.run (
            job_id, run, ended_at, due_at, attempt, crashes, is_final, outcome, error_type, error
        )
        select job_id, run + 1, now(), due_at, attempt, crashes, true, 'cancelled', 'cancelled',
            'discarded'
        from last
        returning run
    )
    select exists (select from discarded)
$$;
comment on function sqlqueue.discard_job is
    'Makes a cancelled job of a failed one; its runs are kept';

create function sqlqueue.delete_job(id uuid) returns boolean
language plpgsql volatile
as $$
declare
    taken bigint;
begin
    -- Who takes the row of its place, or of its end, has the job: one that runs, or is just being
    -- claimed, has neither.
    with was_ready as (
        delete from sqlqueue.ready where job_id = delete_job.id returning job_id
    ),
    was_waiting as (
        delete from sqlqueue.waiting where job_id = delete_job.id returning job_id
    ),
    was_scheduled as (
        delete from sqlqueue.scheduled where job_id = delete_job.id returning job_id
    ),
    had_ended as (
        delete from sqlqueue.run where job_id = delete_job.id and is_final returning job_id
    )
    select count(*) into taken
    from (
        select job_id from was_ready
        union all
        select job_id from was_waiting
        union all
        select job_id from was_scheduled
        union all
        select job_id from had_ended
    ) as taken_from;
    if taken = 0 then
        return false;
    end if;
    delete from sqlqueue.admitted where job_id = delete_job.id;
    delete from sqlqueue.cancel_request where job_id = delete_job.id;
    delete from sqlqueue.log where job_id = delete_job.id;
    delete from sqlqueue.run where job_id = delete_job.id;
    delete from sqlqueue.job where job.id = delete_job.id;
    return true;
end
$$;
comment on function sqlqueue.delete_job is
    'Removes a job that does not run, with its runs and lines';

create function sqlqueue.hurry_job(id uuid) returns boolean
language plpgsql volatile
as $$
declare
    its_queue text;
begin
    update sqlqueue.scheduled set due_at = now()
    where job_id = hurry_job.id
    returning queue into its_queue;
    if not found then
        return false;
    end if;
    perform sqlqueue.ring(its_queue, 'due');
    return true;
end
$$;
comment on function sqlqueue.hurry_job is 'Makes a scheduled job due now';

create function sqlqueue.put_off(id uuid, wait interval) returns void
language sql volatile
as $$
    with was_ready as (
        delete from sqlqueue.ready
        where job_id = put_off.id
        returning job_id, run, failures, crashes, priority, queue
    ),
    was_waiting as (
        delete from sqlqueue.waiting
        where job_id = put_off.id
        returning job_id, run, failures, crashes, priority, queue
    )
    insert into sqlqueue.scheduled (
        job_id, due_at, run, failures, crashes, priority, queue, reason
    )
    select job_id, now() + wait, run, failures, crashes, priority, queue, 'delay'
    from (
        select job_id, run, failures, crashes, priority, queue from was_ready
        union all
        select job_id, run, failures, crashes, priority, queue from was_waiting
    ) as was
$$;
comment on function sqlqueue.put_off is 'Schedules a job that may run now for later';

create function sqlqueue.move_job(id uuid, to_queue text, to_priority integer) returns boolean
language plpgsql volatile
as $$
declare
    was record;
begin
    update sqlqueue.scheduled
    set queue = coalesce(to_queue, queue), priority = coalesce(to_priority, priority)
    where job_id = move_job.id;
    if found then
        return true;
    end if;
    with was_ready as (
        delete from sqlqueue.ready
        where job_id = move_job.id
        returning job_id, due_at, run, failures, crashes, priority, queue
    ),
    was_waiting as (
        delete from sqlqueue.waiting
        where job_id = move_job.id
        returning job_id, due_at, run, failures, crashes, priority, queue
    ),
    left_place as (
        delete from sqlqueue.admitted
        where job_id in (select job_id from was_ready)
    )
    select
        place.job_id, place.due_at, place.run, place.failures, place.crashes,
        coalesce(to_priority, place.priority) as priority, coalesce(to_queue, place.queue) as queue,
        job.task, job.key, job.weight
    into was
    from (
        select job_id, due_at, run, failures, crashes, priority, queue from was_ready
        union all
        select job_id, due_at, run, failures, crashes, priority, queue from was_waiting
    ) as place
    join sqlqueue.job on job.id = place.job_id;
    if not found then
        return false;
    end if;
    insert into sqlqueue.waiting (
        job_id, due_at, run, failures, crashes, priority, queue, flow, weight, rank
    )
    select
        was.job_id, was.due_at, was.run, was.failures, was.crashes, was.priority, was.queue,
        gate.flow, coalesce(was.weight, 1), sqlqueue.rank(was.due_at, was.priority, gate.ageing)
    from sqlqueue.gate(was.queue, was.task, was.key) as gate;
    if not found then
        insert into sqlqueue.ready (job_id, due_at, run, failures, crashes, priority, queue)
        values (
            was.job_id, was.due_at, was.run, was.failures, was.crashes, was.priority, was.queue
        );
    end if;
    perform sqlqueue.ring(was.queue, cast(was.priority as text));
    return true;
end
$$;
comment on function sqlqueue.move_job is
    'Puts a job that has not started into another queue, or gives it another priority';

create function sqlqueue.tell_worker(worker bigint, what text) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    is_done boolean;
begin
    if what not in ('drain', 'stop') then
        raise exception 'sqlqueue.tell_worker: drain or stop'
            using errcode = 'invalid_parameter_value';
    end if;
    update sqlqueue.worker set told = what where id = tell_worker.worker and died_at is null;
    is_done := found;
    perform sqlqueue.note_action(what, 'worker ' || worker, is_done);
    return is_done;
end
$$;
comment on function sqlqueue.tell_worker is
    'Tells a worker, at its next beat, to take no more jobs and end (drain), or to end now (stop)';

create function sqlqueue.mute_failures(fingerprint text, lasts interval) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into sqlqueue.mute (fingerprint, until)
    values (mute_failures.fingerprint, now() + lasts)
    on conflict on constraint mute_pkey do update set until = excluded.until;
    perform sqlqueue.note_action('mute', 'failures ' || mute_failures.fingerprint, true);
end
$$;
comment on function sqlqueue.mute_failures is
    'Says that failures with this cause need no attention for a time';

create function sqlqueue.remove_schedule(name text) returns boolean
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    is_done boolean;
begin
    delete from sqlqueue.schedule where schedule.name = remove_schedule.name;
    is_done := found;
    delete from sqlqueue.tick where schedule = remove_schedule.name;
    perform sqlqueue.note_action('remove_schedule', 'schedule ' || remove_schedule.name, is_done);
    return is_done;
end
$$;
comment on function sqlqueue.remove_schedule is
    'Removes a schedule and what is known of its past';

create function sqlqueue.set_retention(lasts interval) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if lasts < interval '1 day' then
        raise exception 'sqlqueue.set_retention: at least one day'
            using errcode = 'invalid_parameter_value';
    end if;
    update sqlqueue.setting set retention = lasts;
    perform sqlqueue.note_action('set_retention', cast(lasts as text), true);
end
$$;
comment on function sqlqueue.set_retention is 'Says how long history is kept, in whole weeks';

create function sqlqueue.queue_lag(queue text) returns double precision
language sql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
    select cast(sum(jobs) as double precision)
    from (
        select count(*) as jobs
        from (
            select from sqlqueue.ready where ready.queue = queue_lag.queue limit 10001
        ) as ready
        union all
        select count(*)
        from (
            select from sqlqueue.waiting where waiting.queue = queue_lag.queue limit 10001
        ) as waiting
        union all
        select count(*)
        from (
            select from sqlqueue.lease where lease.queue = queue_lag.queue limit 10001
        ) as lease
        union all
        select count(*) filter (where overdue.queue = queue_lag.queue)
        from (
            select scheduled.queue from sqlqueue.scheduled where due_at <= now() limit 10001
        ) as overdue
    ) as counted
$$;
comment on function sqlqueue.queue_lag is
    'Jobs of a queue that run, might run or are overdue; at most 10,001 of each, for autoscalers';

create function sqlqueue.queue_wait(queue text) returns double precision
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(cast((
        select extract(epoch from oldest_wait)
        from sqlqueue.queues
        where queues.queue = queue_wait.queue
    ) as double precision), 0)
$$;
comment on function sqlqueue.queue_wait is
    'Seconds that the job at the head of a queue has waited; 0: there is none';

create function sqlqueue.why(job uuid) returns table (
    is_ok boolean, reason text, detail text, hint text
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    given sqlqueue.job;
    place record;
    stop record;
    crew record;
    rule sqlqueue.policy;
    room record;
    ahead bigint;
begin
    select job.* into given from sqlqueue.job where job.id = why.job;
    if not found then
        return query select false, 'unknown', 'there is no such job',
            'was its transaction committed? Its history may have been dropped';
        return;
    end if;
    select state, queue, priority, due_at, run, worker_id, reason as why_there, waited into place
    from sqlqueue.live where live.id = given.id;
    if not found then
        return query
        select false, 'ended', state || ' at ' || to_char(ended_at, 'YYYY-MM-DD HH24:MI:SS TZ'),
            case when state in ('failed', 'cancelled')
                then 'retry it: sqlqueue jobs retry ' || given.id end
        from sqlqueue.jobs where jobs.id = given.id;
        return;
    end if;
    if place.state = 'running' then
        return query
        select false, 'running',
            format('run %s, by worker %s on %s, last heard of %s s ago', place.run, name, host,
                round(extract(epoch from now() - heartbeat_at))),
            case when heartbeat_at < now() - ttl
                then 'its worker is dead: others take the job soon' end
        from sqlqueue.worker where worker.id = place.worker_id;
        return;
    end if;
    if place.state = 'scheduled' and place.due_at > now() then
        return query select false, 'not due', format(
            'due at %s (%s)', to_char(place.due_at, 'YYYY-MM-DD HH24:MI:SS TZ'), place.why_there
        ), 'run it now: sqlqueue jobs run-now ' || given.id;
        return;
    end if;
    return query select true, 'due', 'since ' || to_char(place.due_at, 'HH24:MI:SS TZ'), null;
    for stop in
        select 'queue' as scope, name, paused_by, paused_why, resumes_at
        from sqlqueue.queue
        where name = place.queue and paused_at is not null
          and coalesce(resumes_at > now(), true)
        union all
        select scope, name, paused_by, paused_why, resumes_at
        from sqlqueue.policy
        where (scope, name) in (('queue', place.queue), ('task', given.task))
          and paused_at is not null and coalesce(resumes_at > now(), true)
    loop
        return query select false, stop.scope || ' paused', concat_ws(' ',
            stop.scope, stop.name, 'by', nullif(stop.paused_by, ''),
            '"' || stop.paused_why || '"', 'until ' || stop.resumes_at::text),
            format('resume it: sqlqueue %ss resume %s', stop.scope, stop.name);
    end loop;
    select
        count(*) filter (where is_alive) as serving,
        count(*) filter (where is_alive and given.task = any (tasks)) as knowing,
        coalesce(sum(slots) filter (where is_alive), 0) as slots,
        (array_agg(name order by heartbeat_at desc))[1] as last_name,
        max(heartbeat_at) as last_at,
        coalesce(sum(busy) filter (where is_alive), 0) as busy
    into crew
    from (
        select
            name, tasks, slots, heartbeat_at, died_at is null and heartbeat_at > now() - ttl
                and told is null as is_alive,
            (select count(*) from sqlqueue.lease where worker_id = worker.id) as busy
        from sqlqueue.worker
        where place.queue = any (queues)
    ) as known;
    if crew.serving = 0 then
        return query select false, 'no worker', format(
            '%s for %s: no live worker serves queue "%s"%s', place.state,
            date_trunc('second', now() - place.due_at), place.queue,
            case when crew.last_name is not null then format(
                ' (last: %s, silent for %s)', crew.last_name,
                date_trunc('second', now() - crew.last_at)
            ) end
        ), 'start one: sqlqueue worker -A MODULE:QUEUE ' || place.queue;
        return;
    end if;
    return query select true, 'served', crew.serving || ' workers serve its queue', null;
    if crew.knowing = 0 then
        return query select false, 'unknown task', format(
            'none of the %s workers of queue "%s" knows the task %s', crew.serving, place.queue,
            given.task
        ), 'deploy the code that has it, or move the job to a queue whose workers do';
        return;
    end if;
    if place.state = 'waiting' then
        for rule in
            select policy.* from sqlqueue.policy
            where (scope, name) in (('queue', place.queue), ('task', given.task))
        loop
            room := sqlqueue.room_in(rule, null);
            if room.places < 1 and rule.paused_at is null then
                return query select false, rule.scope || ' limit', format(
                    '%s %s runs %s jobs at a time', rule.scope, rule.name, rule.concurrency
                ), cast(null as text);
            end if;
            if room.tokens < 1 then
                return query select false, 'rate limit', format(
                    '%s %s starts %s jobs a second', rule.scope, rule.name, rule.rate
                ), format('free again in %s s', round(room.wait::numeric, 1));
            end if;
            room := sqlqueue.room_in(rule, coalesce(given.key, ''));
            if room.places < 1 and rule.keeps_order then
                return query
                select false, 'order', format(
                    'behind job %s of the key "%s"', min(cast(job_id as text)), given.key
                ), cast(null as text)
                from sqlqueue.admitted
                where (scope, name, key) = (rule.scope, rule.name, coalesce(given.key, ''));
            elsif room.places < 1 and rule.paused_at is null then
                return query select false, 'key limit', format(
                    '%s %s runs %s jobs of the key "%s" at a time', rule.scope, rule.name,
                    rule.concurrency_per_key, given.key
                ), cast(null as text);
            end if;
            if room.tokens < 1 then
                return query select false, 'rate limit', format(
                    '%s %s starts %s jobs of a key a second', rule.scope, rule.name,
                    rule.rate_per_key
                ), format('free again in %s s', round(room.wait::numeric, 1));
            end if;
        end loop;
    end if;
    if crew.busy >= crew.slots then
        return query select false, 'no free slot', format(
            'all %s slots of the workers of queue "%s" are busy', crew.slots, place.queue
        ), cast('more workers, or more slots' as text);
    end if;
    if place.state = 'waiting' then
        return query select false, 'fair share',
            'keys take turns: its own comes', cast(null as text);
    elsif place.state = 'ready' then
        select count(*) into ahead
        from (
            select
            from sqlqueue.ready as mine
            join sqlqueue.ready as other
                on other.queue = mine.queue
                and (other.priority, other.seq) < (mine.priority, mine.seq)
            where mine.job_id = given.id
            limit 10001
        ) as counted;
        return query select false, 'in line', format(
            '%s jobs are before it in queue "%s"',
            case when ahead > 10000 then '10,000+' else ahead::text end, place.queue
        ), case when place.why_there = 'suspect'
            then 'it has taken workers down: it runs alone, when nothing else does' end;
    else
        return query select false, 'due now', 'a worker is about to make it ready',
            cast(null as text);
    end if;
end
$$;
comment on function sqlqueue.why is
    'Why a job does not run: the first row that is not ok is the answer';

revoke all on function
    sqlqueue.hist_add, sqlqueue.hist_sum, sqlqueue.hist_quantile, sqlqueue.frame,
    sqlqueue.fingerprint, sqlqueue.held, sqlqueue.job_states, sqlqueue.keep_lines,
    sqlqueue.unknown_since, sqlqueue.beat, sqlqueue.unregister,
    sqlqueue.count_runs, sqlqueue.observe, sqlqueue.count_enqueued, sqlqueue.fold, sqlqueue.note,
    sqlqueue.change, sqlqueue.edit, sqlqueue.discard_job, sqlqueue.delete_job,
    sqlqueue.hurry_job, sqlqueue.put_off, sqlqueue.move_job, sqlqueue.tell_worker,
    sqlqueue.mute_failures, sqlqueue.remove_schedule, sqlqueue.set_retention, sqlqueue.queue_lag,
    sqlqueue.queue_wait, sqlqueue.why
from public;
"""

BACKFILL = r"""
update sqlqueue.run
set queue = job.queue,
    task = job.task,
    fingerprint = sqlqueue.fingerprint(job.task, outcome, error_type, traceback)
from sqlqueue.job
where job.id = run.job_id and is_final and outcome in ('failed', 'timed_out', 'crashed');
"""

VIEWS = r"""
create or replace view sqlqueue.jobs as
select
    place.job_id as id, coalesce(place.queue, job.queue) as queue, job.task, place.state,
    place.reason, coalesce(place.priority, job.priority) as priority, job.args, job.tags,
    job.headers, job.key, job.created_at, place.due_at, job.expires_at, place.started_at,
    place.ended_at, place.run,
    place.attempt, job.attempts, place.crashes, place.worker_id, place.waited, place.ran,
    (
        select log.progress
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as progress,
    (
        select log.message
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as note,
    place.result, place.error_type, place.error, place.traceback, job.description, job.timeout,
    job.unique_key, place.fingerprint
from (
    select
        job_id, 'ready' as state, case when is_suspect then 'suspect' end as reason, queue,
        priority, due_at, cast(null as timestamptz) as started_at,
        cast(null as timestamptz) as ended_at, run, failures + 1 as attempt, crashes,
        cast(null as bigint) as worker_id, now() - due_at as waited,
        cast(null as interval) as ran, cast(null as jsonb) as result,
        cast(null as text) as error_type, cast(null as text) as error,
        cast(null as text) as traceback, cast(null as text) as fingerprint
    from sqlqueue.ready
    union all
    select
        job_id, 'waiting', 'policy', queue, priority, due_at, null, null, run, failures + 1,
        crashes, null, now() - due_at, null, null, null, null, null, null
    from sqlqueue.waiting
    union all
    select
        job_id, 'scheduled', reason, queue, priority, due_at, null, null, run, failures + 1,
        crashes, null, null, null, null, null, null, null, null
    from sqlqueue.scheduled
    union all
    select
        job_id, 'running', null, queue, priority, due_at, claimed_at, null, run, failures + 1,
        crashes, worker_id, claimed_at - due_at, now() - claimed_at, null, null, null, null, null
    from sqlqueue.lease
    union all
    select
        job_id,
        case when outcome in ('failed', 'timed_out', 'crashed') then 'failed' else outcome end,
        case when outcome in ('failed', 'timed_out', 'crashed') then outcome end, queue, null,
        due_at, started_at, ended_at, run, cast(attempt as integer), crashes, worker_id,
        started_at - due_at, make_interval(secs => ran), result, error_type, error, traceback,
        fingerprint
    from sqlqueue.run
    where is_final
) as place
join sqlqueue.job on job.id = place.job_id;

create or replace view sqlqueue.live as
select
    place.job_id as id, place.queue, job.task, place.state, place.reason, place.priority,
    job.args, job.tags, job.headers, job.key, job.created_at, place.due_at, job.expires_at,
    place.started_at, place.run, place.attempt, job.attempts, place.crashes, place.worker_id,
    place.waited, place.ran,
    (
        select log.progress
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as progress,
    (
        select log.message
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as note,
    job.description, job.timeout, job.unique_key
from (
    select
        job_id, 'ready' as state, case when is_suspect then 'suspect' end as reason, queue,
        priority, due_at, cast(null as timestamptz) as started_at, run, failures + 1 as attempt,
        crashes, cast(null as bigint) as worker_id, now() - due_at as waited,
        cast(null as interval) as ran
    from sqlqueue.ready
    union all
    select
        job_id, 'waiting', 'policy', queue, priority, due_at, null, run, failures + 1, crashes,
        null, now() - due_at, null
    from sqlqueue.waiting
    union all
    select
        job_id, 'scheduled', reason, queue, priority, due_at, null, run, failures + 1, crashes,
        null, null, null
    from sqlqueue.scheduled
    union all
    select
        job_id, 'running', null, queue, priority, due_at, claimed_at, run, failures + 1, crashes,
        worker_id, claimed_at - due_at, now() - claimed_at
    from sqlqueue.lease
) as place
-- After `offset 0` no plan begins with the jobs, most of which have ended.
join lateral (select * from sqlqueue.job where job.id = place.job_id offset 0) as job on true;

create view sqlqueue.ended as
select
    run.job_id as id, coalesce(run.queue, job.queue) as queue, job.task,
    case when outcome in ('failed', 'timed_out', 'crashed') then 'failed' else outcome end
        as state,
    outcome, job.priority, job.args, job.tags, job.headers, job.key, job.unique_key,
    job.created_at, run.due_at, run.started_at, run.ended_at, run.run,
    cast(run.attempt as integer) as attempt, job.attempts, run.crashes, run.worker_id,
    run.started_at - run.due_at as waited, make_interval(secs => run.ran) as ran, run.result,
    run.error_type, run.error, run.fingerprint
from sqlqueue.run
-- After `offset 0` runs are always read first: in their order, and no more of them than needed.
join lateral (select * from sqlqueue.job where job.id = run.job_id offset 0) as job on true
where run.is_final;

create or replace view sqlqueue.runs as
select
    job_id, run, cast(attempt as integer) as attempt, worker_id, started_at, ended_at,
    make_interval(secs => ran) as ran,
    outcome, is_final as final, result, error_type, error, traceback,
    fingerprint
from sqlqueue.run
union all
select
    job_id, run, failures + 1, worker_id, claimed_at, null, now() - claimed_at,
    'running', false, null, null, null, null, null
from sqlqueue.lease;

create or replace view sqlqueue.queues as
with recursive lane (queue, is_suspect, priority) as (
    (
        select queue, is_suspect, priority
        from sqlqueue.ready
        order by queue, is_suspect, priority
        limit 1
    )
    union all
    select next.queue, next.is_suspect, next.priority
    from lane
    cross join lateral (  -- by index steps: what is between two lanes is not read
        select queue, is_suspect, priority
        from sqlqueue.ready
        where (ready.queue, ready.is_suspect, ready.priority)
            > (lane.queue, lane.is_suspect, lane.priority)
        order by queue, is_suspect, priority
        limit 1
    ) as next
),
holding (queue) as (
    (select queue from sqlqueue.waiting order by queue limit 1)
    union all
    select next.queue
    from holding
    cross join lateral (
        select queue from sqlqueue.waiting
        where waiting.queue > holding.queue
        order by queue
        limit 1
    ) as next
),
level (queue, ready, waiting, scheduled, running, oldest) as (
    select lane.queue, counted.jobs, 0, 0, 0, head.due_at
    from lane
    cross join lateral (
        select count(*) as jobs
        from (
            select
            from sqlqueue.ready
            where ready.queue = lane.queue
              and ready.is_suspect = lane.is_suspect
              and ready.priority = lane.priority
            limit 10001
        ) as found
    ) as counted
    left join lateral (
        select due_at
        from sqlqueue.ready
        where ready.queue = lane.queue
          and ready.is_suspect = lane.is_suspect
          and ready.priority = lane.priority
        order by seq
        limit 1
    ) as head on true
    union all
    select holding.queue, 0, counted.jobs, 0, 0, counted.oldest
    from holding
    cross join lateral (
        select count(*) as jobs, min(due_at) as oldest
        from (
            select due_at from sqlqueue.waiting where waiting.queue = holding.queue limit 10001
        ) as found
    ) as counted
    union all
    select queue, 0, 0, count(*), 0, null
    from (select queue from sqlqueue.scheduled order by due_at limit 10001) as found
    group by queue
    union all
    select queue, 0, 0, 0, count(*), null
    from (select queue from sqlqueue.lease limit 10001) as found
    group by queue
),
failing (queue, jobs) as (
    select queue, count(*)
    from (
        select queue
        from sqlqueue.run
        where is_final and outcome in ('failed', 'timed_out', 'crashed')
        order by ended_at desc
        limit 10001
    ) as newest
    group by queue
),
crew (queue, workers, slots) as (
    select queue, count(*), sum(slots)
    from sqlqueue.worker
    cross join unnest(queues) as queue
    where died_at is null and heartbeat_at > now() - ttl
    group by queue
),
flowing as (
    select
        queue,
        sum(enqueued) filter (
            where at = date_trunc('minute', now(), 'UTC') - interval '2 minutes'
        ) as in_1m,
        sum(succeeded + failed + cancelled) filter (
            where at = date_trunc('minute', now(), 'UTC') - interval '1 minute'
        ) as out_1m,
        sqlqueue.hist_sum(waited) as waited,
        sqlqueue.hist_sum(ran) as ran
    from sqlqueue.flow
    where at >= now() - interval '10 minutes' and step <> 'hour'
    group by queue
),
known (queue) as (
    select queue from level
    union
    select name from sqlqueue.queue
    union
    select name from sqlqueue.policy where scope = 'queue'
    union
    select queue from crew
    union
    select queue from failing where queue is not null
),
summed as (
    select
        known.queue,
        cast(coalesce(sum(level.ready), 0) as bigint) as ready,
        cast(coalesce(sum(level.waiting), 0) as bigint) as waiting,
        cast(coalesce(sum(level.scheduled), 0) as bigint) as scheduled,
        cast(coalesce(sum(level.running), 0) as bigint) as running,
        now() - min(level.oldest) as oldest_wait
    from known
    left join level on level.queue = known.queue
    group by known.queue
)
select
    summed.queue, summed.ready, summed.waiting, summed.scheduled, summed.running,
    summed.oldest_wait,
    policy.concurrency, policy.rate,
    pause.paused_at, pause.paused_by, pause.paused_why, pause.resumes_at,
    coalesce(failing.jobs, 0) as failed,
    cast(coalesce(flowing.in_1m, 0) as bigint) as in_1m,
    cast(coalesce(flowing.out_1m, 0) as bigint) as out_1m,
    sqlqueue.hist_quantile(flowing.waited, 0.5) as waited_p50,
    sqlqueue.hist_quantile(flowing.waited, 0.95) as waited_p95,
    sqlqueue.hist_quantile(flowing.ran, 0.95) as ran_p95,
    case when flowing.out_1m > 0
        then (summed.ready + summed.waiting) / cast(flowing.out_1m as double precision)
            * interval '1 minute'
    end as drained_in,
    coalesce(crew.workers, 0) as workers,
    cast(coalesce(crew.slots, 0) as bigint) as slots
from summed
left join failing on failing.queue = summed.queue
left join crew on crew.queue = summed.queue
left join flowing on flowing.queue = summed.queue
left join sqlqueue.policy on policy.scope = 'queue' and policy.name = summed.queue
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
    where name = summed.queue
      and paused_at is not null
      and coalesce(resumes_at > now(), true)
    order by resumes_at desc nulls first
    limit 1
) as pause on true;

create or replace view sqlqueue.schedules as
select
    schedule.name, schedule.task, schedule.cron, schedule.every, schedule.tz, schedule.missed,
    nullif(schedule.next_at, 'infinity') as next_at, schedule.last_at, schedule.problem,
    schedule.paused_at, schedule.paused_by,
    schedule.paused_why, schedule.resumes_at,
    coalesce(schedule.options ->> 'queue', 'default') as queue,
    schedule.paused_at is null or coalesce(schedule.resumes_at <= now(), false) as is_enabled,
    last.job_id as last_job_id,
    last.state as last_state,
    exists (
        select
        from sqlqueue.queue
        where queue.name = coalesce(schedule.options ->> 'queue', 'default')
          and queue.paused_at is not null
          and coalesce(queue.resumes_at > now(), true)
    ) as is_queue_paused,
    case when schedule.is_declared then 'code' else 'database' end as source
from sqlqueue.schedule
left join lateral (
    select newest.job_id, jobs.state
    from (
        select job_id
        from sqlqueue.tick
        where tick.schedule = schedule.name
        order by at desc
        limit 1
    ) as newest
    left join lateral (
        select state from sqlqueue.jobs where jobs.id = newest.job_id limit 1
    ) as jobs on true
) as last on true;

create view sqlqueue.failures as
select
    cause.fingerprint, newest.task, newest.queue, newest.error_type,
    sqlqueue.frame(left(newest.traceback, 100000)) as source, cause.jobs, cause.first_at,
    cause.last_at, cause.sample_id, newest.error as sample_error, mute.until as muted_until
from (
    select
        fingerprint, count(*) as jobs, min(ended_at) as first_at, max(ended_at) as last_at,
        cast(max(cast(job_id as text)) as uuid) as sample_id
    from (
        select fingerprint, ended_at, job_id
        from sqlqueue.run
        where is_final and outcome in ('failed', 'timed_out', 'crashed')
        order by ended_at desc
        limit 100000
    ) as found
    group by fingerprint
) as cause
cross join lateral (
    select task, queue, error_type, error, traceback
    from sqlqueue.run
    where job_id = cause.sample_id and is_final
    limit 1
) as newest
left join sqlqueue.mute on mute.fingerprint = cause.fingerprint and mute.until > now();

create view sqlqueue.workers as
select
    worker.id, worker.name, worker.host, worker.pid, worker.version, worker.queues, worker.tasks,
    worker.slots, coalesce(held.jobs, 0) as busy, worker.started_at, worker.heartbeat_at,
    case
        when worker.died_at is not null or worker.heartbeat_at < now() - worker.ttl then 'dead'
        when worker.heartbeat_at < now() - worker.ttl / 3 then 'late'
        when worker.told is not null then 'draining'
        else 'alive'
    end as liveness,
    worker.rss_bytes, worker.cpu, worker.jobs_done, held.running
from sqlqueue.worker
left join lateral (
    select
        count(*) as jobs,
        (array_agg(job_id order by claimed_at))[1:100] as running
    from sqlqueue.lease
    where worker_id = worker.id
) as held on true
where worker.died_at is null
   or (worker.died_at > now() - interval '1 hour' and worker.told is distinct from 'left');

create view sqlqueue.tasks as
with flowing as (
    select
        task, array_agg(distinct queue) as queues, sum(succeeded) as succeeded,
        sum(failed) as failed, sum(retried) as retried, sqlqueue.hist_sum(ran) as ran
    from sqlqueue.flow
    where at >= now() - interval '1 hour' and step <> 'hour'
    group by task
),
known as (
    select distinct task
    from sqlqueue.worker
    cross join unnest(tasks) as task
    where died_at is null and heartbeat_at > now() - ttl
),
named as (
    select task from flowing
    union
    select task from known
    union
    select name from sqlqueue.policy where scope = 'task'
    union
    select job.task
    from (select job_id from sqlqueue.ready order by job_id desc limit 100) as newest
    join sqlqueue.job on job.id = newest.job_id
)
select
    named.task, flowing.queues,
    case when coalesce(policy.resumes_at > now(), true) then policy.paused_at end as paused_at,
    cast(coalesce(flowing.succeeded, 0) as bigint) as succeeded_1h,
    cast(coalesce(flowing.failed, 0) as bigint) as failed_1h,
    cast(coalesce(flowing.retried, 0) as bigint) as retried_1h,
    cast(flowing.failed / nullif(flowing.failed + flowing.succeeded, 0) as double precision)
        as failed_share,
    sqlqueue.hist_quantile(flowing.ran, 0.5) as ran_p50,
    sqlqueue.hist_quantile(flowing.ran, 0.95) as ran_p95,
    sqlqueue.hist_quantile(flowing.ran, 0.99) as ran_p99,
    exists (select from known where known.task = named.task) as is_known
from named
left join flowing on flowing.task = named.task
left join sqlqueue.policy on policy.scope = 'task' and policy.name = named.task;

create view sqlqueue.minutes as
select
    at, queue, task,
    cast(sum(enqueued) as bigint) as enqueued, cast(sum(started) as bigint) as started,
    cast(sum(succeeded) as bigint) as succeeded, cast(sum(failed) as bigint) as failed,
    cast(sum(retried) as bigint) as retried, cast(sum(cancelled) as bigint) as cancelled,
    sqlqueue.hist_sum(waited) as waited_hist, sqlqueue.hist_sum(ran) as ran_hist
from sqlqueue.flow
where step <> 'hour'
group by at, queue, task;

create view sqlqueue.hours as
select
    at, queue, task,
    enqueued, started, succeeded, failed, retried, cancelled, waited as waited_hist,
    ran as ran_hist
from sqlqueue.flow
where step = 'hour'
union all
select
    date_trunc('hour', at, 'UTC'), queue, task,
    cast(sum(enqueued) as bigint), cast(sum(started) as bigint),
    cast(sum(succeeded) as bigint), cast(sum(failed) as bigint),
    cast(sum(retried) as bigint), cast(sum(cancelled) as bigint),
    sqlqueue.hist_sum(waited), sqlqueue.hist_sum(ran)
from sqlqueue.flow
where step <> 'hour'
  and at >= coalesce(
      (select max(at) + interval '1 hour' from sqlqueue.flow where step = 'hour'), '-infinity'
  )
group by 1, 2, 3;

create view sqlqueue.depths as
select at, queue, ready, waiting, scheduled, running, oldest_wait
from sqlqueue.depth;

create view sqlqueue.counters as
select
    queue, task,
    cast(sum(enqueued) as bigint) as enqueued, cast(sum(started) as bigint) as started,
    cast(sum(succeeded) as bigint) as succeeded, cast(sum(failed) as bigint) as failed,
    cast(sum(retried) as bigint) as retried, cast(sum(cancelled) as bigint) as cancelled,
    sqlqueue.hist_sum(waited) as waited_hist, sqlqueue.hist_sum(ran) as ran_hist
from (
    select
        queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited, ran
    from sqlqueue.total
    union all
    select
        queue, task, enqueued, started, succeeded, failed, retried, cancelled, waited, ran
    from sqlqueue.flow
    where step = 'open'
) as counted
group by queue, task;

create view sqlqueue.totals as
with level as materialized (
    select
        queue, ready, waiting, scheduled, running, failed, workers, slots, oldest_wait, in_1m,
        out_1m, waited_p95, drained_in, paused_at
    from sqlqueue.queues
),
crew as materialized (
    select id, name, slots, busy, liveness, heartbeat_at
    from sqlqueue.workers
    where liveness <> 'dead' or heartbeat_at > now() - interval '10 minutes'
),
minute as materialized (
    select at, enqueued, succeeded, failed, cancelled, waited
    from sqlqueue.flow
    where at >= date_trunc('minute', now(), 'UTC') - interval '1 hour' and step <> 'hour'
)
select
    now() as at,
    (
        select jsonb_build_object(
            'ready', coalesce(sum(ready), 0), 'waiting', coalesce(sum(waiting), 0),
            'scheduled', coalesce(sum(scheduled), 0), 'running', coalesce(sum(running), 0),
            'failed', coalesce(sum(failed), 0),
            'oldest_wait', extract(epoch from max(oldest_wait)),
            'slots', (select coalesce(sum(slots), 0) from crew where liveness <> 'dead'),
            'workers', (select count(*) from crew where liveness <> 'dead'),
            'ended_1h', (select coalesce(sum(succeeded + failed + cancelled), 0) from minute),
            'waited_p95', (
                select extract(epoch from sqlqueue.hist_quantile(sqlqueue.hist_sum(waited), 0.95))
                from minute
                where at >= now() - interval '10 minutes'
            )
        )
        from level
    ) as overview,
    (
        select coalesce(jsonb_agg(jsonb_build_object(
            'queue', queue, 'ready', ready, 'waiting', waiting, 'scheduled', scheduled,
            'running', running, 'failed', failed, 'workers', workers, 'slots', slots,
            'oldest_wait', extract(epoch from oldest_wait), 'in_1m', in_1m, 'out_1m', out_1m,
            'waited_p95', extract(epoch from waited_p95),
            'drained_in', extract(epoch from drained_in), 'is_paused', paused_at is not null
        ) order by queue), '[]')
        from level
    ) as queues,
    (
        select coalesce(jsonb_agg(jsonb_build_object(
            'id', id, 'name', name, 'slots', slots, 'busy', busy, 'liveness', liveness
        ) order by id), '[]')
        from crew
    ) as workers,
    (
        select coalesce(jsonb_agg(jsonb_build_array(
            extract(epoch from at), enqueued, succeeded, failed
        ) order by at), '[]')
        from (
            select at, sum(enqueued) as enqueued, sum(succeeded) as succeeded,
                sum(failed) as failed
            from minute
            group by at
        ) as summed
    ) as flow;

create view sqlqueue.storage as
select
    cast(parent.relname as text) as "table",
    cast(sum(stat.n_live_tup) as bigint) as live,
    cast(sum(stat.n_dead_tup) as bigint) as dead,
    cast(sum(pg_table_size(stat.relid)) as bigint) as bytes,
    cast(sum(pg_indexes_size(stat.relid)) as bigint) as index_bytes,
    max(greatest(stat.last_vacuum, stat.last_autovacuum)) as vacuumed_at
from pg_stat_user_tables as stat
left join pg_inherits on inhrelid = stat.relid
join pg_class as parent on parent.oid = coalesce(inhparent, stat.relid)
where stat.schemaname = 'sqlqueue'
group by parent.relname;

create view sqlqueue.health as
with activity as (
    select
        pid, usename, state, backend_type, xact_start,
        now() - xact_start as lasts,
        query = '<insufficient privilege>' as is_hidden,
        backend_xmin is not null or backend_xid is not null as holds
    from pg_stat_activity
    where coalesce(backend_type, 'client backend') = 'client backend' and pid <> pg_backend_pid()
),
alive as (
    select queues, tasks, version
    from sqlqueue.worker
    where died_at is null and heartbeat_at > now() - ttl
),
found (place, name, level, value, detail, fix) as (
    select
        1, 'version',
        case when current_setting('server_version_num')::integer >= 150000
            then 'ok' else 'error' end,
        current_setting('server_version'), 'of Postgres; 15 or newer is needed',
        cast(null as text)
    union all
    select
        2, 'tls',
        case
            when ssl or inet_server_addr() is null or inet_client_addr() = inet_server_addr()
                then 'ok'
            else 'warn'
        end,
        case when ssl then version when inet_server_addr() is null then 'socket' else 'none' end,
        'of this session', null
    from pg_stat_ssl
    where pid = pg_backend_pid()
    union all
    select
        3, 'snapshot',
        case
            when max(lasts) filter (where holds) > interval '1 hour' then 'error'
            when max(lasts) filter (where holds) > interval '5 minutes' then 'warn'
            when bool_or(is_hidden) then 'unknown'
            else 'ok'
        end,
        coalesce(date_trunc('second', max(lasts) filter (where holds))::text, 'none'),
        'oldest transaction: while it lasts no dead row goes',
        'select pg_terminate_backend(' || (
            array_agg(pid order by xact_start) filter (where lasts > interval '5 minutes' and holds)
        )[1] || ')'
    from activity
    union all
    select
        4, 'prepared', case when count(*) > 0 then 'error' else 'ok' end, count(*)::text,
        'prepared transactions older than 5 minutes: they keep dead rows and locks',
        'rollback prepared ''' || min(gid) || ''''
    from pg_prepared_xacts
    where prepared < now() - interval '5 minutes'
    union all
    select
        5, 'replication slots', case when count(*) > 0 then 'warn' else 'ok' end, count(*)::text,
        'inactive slots that keep dead rows',
        'select pg_drop_replication_slot(''' || min(slot_name) || ''')'
    from pg_replication_slots
    where not active and (xmin is not null or catalog_xmin is not null)
    union all
    select
        6, 'dead rows',
        case when max(n_dead_tup) filter (where n_dead_tup > 5 * n_live_tup) > 100000
            then 'warn' else 'ok' end,
        coalesce(max(n_dead_tup), 0)::text, 'most in one of the tables that jobs pass through',
        'vacuum ' || (array_agg('sqlqueue.' || relname order by n_dead_tup desc))[1]
    from pg_stat_user_tables
    where schemaname = 'sqlqueue'
      and relname in ('ready', 'waiting', 'scheduled', 'lease', 'doorbell')
    union all
    select
        7, 'autovacuum',
        case when current_setting('autovacuum') = 'on' and count(*) = 0 then 'ok' else 'error' end,
        current_setting('autovacuum'),
        'and off for ' || count(*) || ' of our tables',
        'alter table sqlqueue.' || min(relname) || ' reset (autovacuum_enabled)'
    from pg_class
    where relnamespace = to_regnamespace('sqlqueue')
      and array_to_string(reloptions, ' ') ~ 'autovacuum_enabled=(off|false|0|no)'
    union all
    select
        8, 'freeze age',
        case when max(age(relfrozenxid)) > 1000000000 then 'error'
            when max(age(relfrozenxid)) > 500000000 then 'warn' else 'ok' end,
        max(age(relfrozenxid))::text, 'transactions since the oldest table was frozen',
        'vacuum freeze'
    from pg_class
    where relnamespace = to_regnamespace('sqlqueue') and relkind = 'r'
    union all
    select
        9, 'partitions ahead',
        case when count(*) filter (where lasts_until < now() + interval '2 weeks') > 0
            then 'error' else 'ok' end,
        min(lasts_until)::date::text, 'the day until which there are partitions',
        'select sqlqueue.tidy()'
    from (
        select to_date(max(right(child.relname, 8)), 'YYYYMMDD') + interval '1 week' as lasts_until
        from pg_inherits
        join pg_class as child on child.oid = inhrelid and child.relname ~ '_[0-9]{8}$'
        where inhparent in (
            to_regclass('sqlqueue.job'), to_regclass('sqlqueue.run'), to_regclass('sqlqueue.log')
        )
        group by inhparent
    ) as ahead
    union all
    select
        10, 'partitions overdue', case when count(*) > 0 then 'warn' else 'ok' end,
        count(*)::text, 'partitions past the retention that are still there',
        'select sqlqueue.tidy()'
    from pg_inherits
    join pg_class as child on child.oid = inhrelid and child.relname ~ '_[0-9]{8}$'
    where inhparent in (
            to_regclass('sqlqueue.job'), to_regclass('sqlqueue.run'), to_regclass('sqlqueue.log')
        )
      and to_date(right(child.relname, 8), 'YYYYMMDD') + interval '9 days'
          < now() - (select retention from sqlqueue.setting)
    union all
    select
        11, 'default partitions', case when count(*) > 0 then 'warn' else 'ok' end,
        count(*)::text, 'rows of run_default, 1,000 at most: no partition was made for them',
        'select sqlqueue.tidy()'
    from (select from sqlqueue.run_default limit 1000) as stray
    union all
    select
        12, 'indexes', case when count(*) > 0 then 'error' else 'ok' end, count(*)::text,
        'indexes that are not valid', 'reindex index sqlqueue.' || min(relname)
    from pg_index
    join pg_class on pg_class.oid = indexrelid
    where relnamespace = to_regnamespace('sqlqueue') and not indisvalid
    union all
    select
        13, 'notifications',
        case when pg_notification_queue_usage() > 0.5 then 'error'
            when pg_notification_queue_usage() > 0.1 then 'warn' else 'ok' end,
        round(pg_notification_queue_usage()::numeric * 100, 1) || ' %',
        'of the queue of notifications is used: somebody who listens reads none',
        null
    union all
    select
        14, 'connections',
        case when count(*) > 0.9 * current_setting('max_connections')::integer
            then 'warn' else 'ok' end,
        count(*) || ' of ' || current_setting('max_connections'), 'connections are open', null
    from pg_stat_activity
    where coalesce(backend_type, 'client backend') = 'client backend'
    union all
    select
        15, 'durability',
        case when current_setting('fsync') = 'off' or current_setting('full_page_writes') = 'off'
            then 'error'
            when current_setting('synchronous_commit') = 'off' then 'warn' else 'ok' end,
        'fsync ' || current_setting('fsync') || ', synchronous_commit '
            || current_setting('synchronous_commit'),
        'what is off may lose jobs in a crash of the server', null
    union all
    select
        16, 'timeouts',
        case when reset_val::bigint between 1 and 4999 then 'warn' else 'ok' end,
        reset_val || ' ms', 'statement_timeout of this role: short ones end upkeep', null
    from pg_settings
    where name = 'statement_timeout'
    union all
    select
        17, 'dead workers', case when count(*) > 0 then 'error' else 'ok' end, count(*)::text,
        'silent for longer than 2 ttl, and nobody takes their jobs',
        'start a worker: it rescues them'
    from sqlqueue.worker
    where died_at is null and heartbeat_at < now() - 2 * ttl
    union all
    select
        18, 'versions', case when count(distinct version) > 1 then 'warn' else 'ok' end,
        coalesce(string_agg(distinct version, ', '), 'no worker'), 'of the live workers', null
    from alive
    union all
    select
        19, 'queues', case when count(*) > 0 then 'error' else 'ok' end,
        coalesce(string_agg(queue, ', '), 'all served'),
        'queues with jobs that no live worker serves',
        'sqlqueue worker -A MODULE:QUEUE ' || min(queue)
    from sqlqueue.queues
    where ready + waiting > 0 and workers = 0
    union all
    select
        20, 'tasks', case when count(*) > 0 then 'error' else 'ok' end,
        coalesce(string_agg(distinct task, ', '), 'all known'),
        'tasks of waiting jobs that no live worker knows', 'deploy the code that has them'
    from (
        select job.task
        from (select job_id from sqlqueue.ready order by job_id desc limit 100) as newest
        join sqlqueue.job on job.id = newest.job_id
        union all
        select job.task
        from (
            select job_id from sqlqueue.scheduled where reason = 'snooze' limit 100
        ) as put_off
        join sqlqueue.job on job.id = put_off.job_id
    ) as wanted
    where exists (select from alive)
      and not exists (select from alive where wanted.task = any (alive.tasks))
    union all
    select
        21, 'schedules', case when count(*) > 0 then 'error' else 'ok' end,
        coalesce(string_agg(name, ', '), 'on time'),
        coalesce('late by over a minute, or with a problem: ' || min(problem),
            'late by over a minute, or with a problem'),
        'start a worker: any fires them'
    from sqlqueue.schedule
    where (paused_at is null or resumes_at <= now())
      and (next_at < now() - interval '1 minute' or problem is not null)
    union all
    select
        22, 'upkeep',
        case
            when not exists (select from alive) then 'ok'
            when observed_at > now() - interval '5 minutes' then 'ok'
            when observed_at is null
                and not exists (
                    select from sqlqueue.worker where started_at < now() - interval '5 minutes'
                )
            then 'ok'
            else 'warn'
        end,
        coalesce(to_char(observed_at, 'YYYY-MM-DD HH24:MI'), 'never'),
        'levels were sampled and counts folded last', 'read the log of the workers'
    from sqlqueue.setting
)
select
    place, name, level = 'ok' as is_ok, level, value, detail,
    case when level <> 'ok' then fix end as fix
from found;

create view sqlqueue.metrics as
with level as materialized (
    select queue, ready, waiting, scheduled, running, failed, oldest_wait, paused_at
    from sqlqueue.queues
),
worker as materialized (
    select liveness, slots, busy from sqlqueue.workers
),
ranked as (
    select *, row_number() over (order by enqueued desc, queue, task) as rank
    from sqlqueue.counters
),
counter as materialized (
    select
        queue, name as task, sum(enqueued) as enqueued, sum(succeeded) as succeeded,
        sum(failed) as failed, sum(retried) as retried, sum(cancelled) as cancelled,
        sqlqueue.hist_sum(waited_hist) as waited, sqlqueue.hist_sum(ran_hist) as ran
    from ranked
    cross join lateral (select case when rank <= 200 then task else 'other' end as name) as label
    group by queue, name
),
hist as (
    select 'wait_seconds' as family, 'how long runs had waited' as says, queue, task, waited as hist
    from counter
    union all
    select 'run_seconds', 'how long runs took', queue, task, ran from counter
),
bucket as (
    select
        family, says, queue, task, place,
        coalesce(sum(number) over span, 0) as below,
        coalesce(sum(number * 2 ^ ((place - 1.5) / 2) / 1000) over span, 0) as seconds
    from hist
    cross join lateral (
        select place, hist[place] as number from generate_series(1, 48) as place
    ) as each
    window span as (partition by family, queue, task order by place)
)
select family, kind, says, name, labels, cast(value as double precision) as value
from (
    select
        'jobs' as family, 'gauge' as kind, 'jobs in a state; 10001 stands for more' as says,
        'jobs' as name, json_build_object('queue', queue, 'state', state) as labels,
        cast(number as numeric) as value
    from level
    cross join lateral (
        values
            ('ready', ready), ('waiting', waiting), ('scheduled', scheduled),
            ('running', running), ('failed', failed)
    ) as states (state, number)
    union all
    select
        'oldest_ready_seconds', 'gauge', 'wait of the job at the head of a queue',
        'oldest_ready_seconds', json_build_object('queue', queue),
        coalesce(extract(epoch from oldest_wait), 0)
    from level
    union all
    select
        'paused', 'gauge', 'whether a queue is paused', 'paused',
        json_build_object('queue', queue), cast(paused_at is not null as integer)
    from level
    union all
    select
        'workers', 'gauge', 'worker processes', 'workers', json_build_object('liveness', word),
        (select count(*) from worker where liveness = word)
    from unnest(array['alive', 'draining', 'late', 'dead']) as word
    union all
    select
        'slots', 'gauge', 'jobs that run at a time', 'slots', json_build_object(),
        coalesce(sum(slots), 0)
    from worker
    where liveness <> 'dead'
    union all
    select
        'slots_busy', 'gauge', 'slots in use', 'slots_busy', json_build_object(),
        coalesce(sum(busy), 0)
    from worker
    where liveness <> 'dead'
    union all
    select
        'enqueued_total', 'counter', 'jobs enqueued', 'enqueued_total',
        json_build_object('queue', queue, 'task', task), enqueued
    from counter
    union all
    select
        'ended_total', 'counter', 'runs that ended so', 'ended_total',
        json_build_object('queue', queue, 'task', task, 'outcome', outcome), number
    from counter
    cross join lateral (
        values
            ('succeeded', succeeded), ('failed', failed), ('retried', retried),
            ('cancelled', cancelled)
    ) as outcomes (outcome, number)
    union all
    select
        'schedule_late_seconds', 'gauge', 'how late a schedule is', 'schedule_late_seconds',
        json_build_object('schedule', name), greatest(extract(epoch from now() - next_at), 0)
    from sqlqueue.schedules
    where is_enabled and next_at is not null
    union all
    select
        'health', 'gauge', 'whether a check is well', 'health',
        json_build_object('check', health.name), cast(level = 'ok' as integer)
    from sqlqueue.health
    union all
    select
        family, 'histogram', says, family || name,
        case
            when le is null then json_build_object('queue', queue, 'task', task)
            else json_build_object('queue', queue, 'task', task, 'le', le)
        end,
        cast(number as numeric)
    from bucket
    cross join lateral (
        select '_bucket' as name, cast(2 ^ ((place - 1) / 2) / 1000 as text) as le, below as number
        where place % 2 = 1
        union all
        select '_bucket', '+Inf', below where place = 48
        union all
        select '_sum', null, cast(seconds as numeric) where place = 48
        union all
        select '_count', null, below where place = 48
    ) as part
) as metric
order by
    family, labels ->> 'queue', labels ->> 'task', name,
    cast(nullif(labels ->> 'le', '+Inf') as double precision);

create view sqlqueue.counts as
select queue, state, count(*) as jobs
from (
    select queue, 'ready' as state from sqlqueue.ready
    union all
    select queue, 'waiting' from sqlqueue.waiting
    union all
    select queue, 'scheduled' from sqlqueue.scheduled
    union all
    select queue, 'running' from sqlqueue.lease
) as live
group by queue, state
order by queue, state;

create function sqlqueue.flow_of(lasts interval, queue text default null, task text default null)
returns table (
    at timestamptz, enqueued bigint, succeeded bigint, failed bigint,
    waited_p50 interval, waited_p95 interval, ran_p95 interval
)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select
        rows.at,
        -- Counted when the minute is over, by the next upkeep.
        case
            when flow_of.lasts > interval '6 hours' or rows.at < now() - interval '70 s'
            then cast(sum(rows.enqueued) as bigint)
        end,
        cast(sum(rows.succeeded) as bigint),
        cast(sum(rows.failed) as bigint),
        sqlqueue.hist_quantile(sqlqueue.hist_sum(rows.waited_hist), 0.5),
        sqlqueue.hist_quantile(sqlqueue.hist_sum(rows.waited_hist), 0.95),
        sqlqueue.hist_quantile(sqlqueue.hist_sum(rows.ran_hist), 0.95)
    from (
        -- As the view minutes has them, but added up only once.
        select
            flow.at, flow.queue, flow.task, flow.enqueued, flow.succeeded, flow.failed,
            flow.waited as waited_hist, flow.ran as ran_hist
        from sqlqueue.flow
        where flow_of.lasts <= interval '6 hours' and flow.at >= now() - flow_of.lasts
          and flow.step <> 'hour'
        union all
        select
            hours.at, hours.queue, hours.task, hours.enqueued, hours.succeeded, hours.failed,
            hours.waited_hist, hours.ran_hist
        from sqlqueue.hours
        where flow_of.lasts > interval '6 hours' and hours.at >= now() - flow_of.lasts
    ) as rows
    where (rows.queue = flow_of.queue or flow_of.queue is null)
      and (rows.task = flow_of.task or flow_of.task is null)
    group by rows.at
    order by rows.at
$$;
comment on function sqlqueue.flow_of is
    'What came (null for the present minute) and went lately: by the minute, above 6 h by the hour';

create function sqlqueue.past_retention(lasts interval) returns setof text
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select child.relname
    from pg_inherits
    join pg_class as child on child.oid = inhrelid
    join pg_class as parent on parent.oid = inhparent
    cross join sqlqueue.setting
    where parent.relnamespace = 'sqlqueue'::regnamespace
      and child.relname ~ '_[0-9]{8}$'
      and to_date(right(child.relname, 8), 'YYYYMMDD') + interval '7 days'
          <= now() - coalesce(past_retention.lasts, retention)
    order by child.relname
$$;
comment on function sqlqueue.past_retention is
    'The weeks of history that a retention leaves out; null: the one that is set';

revoke all on function sqlqueue.flow_of, sqlqueue.past_retention from public;

comment on view sqlqueue.queues
    is 'Queues that are served, hold jobs or failures, or have rules';
comment on column sqlqueue.queues.queue
    is 'name of the queue';
comment on column sqlqueue.queues.ready
    is 'jobs that may run now; of a priority, 10,001 stands for more';
comment on column sqlqueue.queues.waiting
    is 'jobs that wait under a policy; 10,001 stands for more';
comment on column sqlqueue.queues.scheduled
    is 'jobs that may run later, of the 10,001 that are due first';
comment on column sqlqueue.queues.running
    is 'jobs that run';
comment on column sqlqueue.queues.oldest_wait
    is 'of the jobs at the heads of its lanes';
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
comment on column sqlqueue.queues.failed
    is 'jobs that failed, of the newest 10,001 of all queues';
comment on column sqlqueue.queues.in_1m
    is 'jobs enqueued in the minute before the last';
comment on column sqlqueue.queues.out_1m
    is 'jobs that ended in the last whole minute';
comment on column sqlqueue.queues.waited_p50
    is 'median wait of the runs that ended in the last 10 minutes';
comment on column sqlqueue.queues.waited_p95
    is 'of these, the wait that 95 % did not exceed';
comment on column sqlqueue.queues.ran_p95
    is 'how long 95 % of the runs that ended in the last 10 minutes took at most';
comment on column sqlqueue.queues.drained_in
    is 'time to run what is ready and waiting at the rate of the last minute; null: nothing ends';
comment on column sqlqueue.queues.workers
    is 'live workers that serve it';
comment on column sqlqueue.queues.slots
    is 'of these together';

comment on view sqlqueue.failures
    is 'Failed jobs by cause, of the newest 100,000';
comment on column sqlqueue.failures.fingerprint
    is 'names the cause: task, error and place';
comment on column sqlqueue.failures.task
    is 'the task';
comment on column sqlqueue.failures.queue
    is 'the queue of the sample';
comment on column sqlqueue.failures.error_type
    is 'class of the exception, or a plain reason';
comment on column sqlqueue.failures.source
    is 'file and function of the innermost frame of the application';
comment on column sqlqueue.failures.jobs
    is 'how many jobs';
comment on column sqlqueue.failures.first_at
    is 'when the first failed';
comment on column sqlqueue.failures.last_at
    is 'when the last failed';
comment on column sqlqueue.failures.sample_id
    is 'the job that was enqueued last';
comment on column sqlqueue.failures.sample_error
    is 'its message';
comment on column sqlqueue.failures.muted_until
    is 'no attention is needed before; null: it is';

comment on view sqlqueue.workers
    is 'Worker processes that live, or died within an hour';
comment on column sqlqueue.workers.id
    is 'never used again';
comment on column sqlqueue.workers.name
    is 'for people';
comment on column sqlqueue.workers.host
    is 'its machine';
comment on column sqlqueue.workers.pid
    is 'process id there';
comment on column sqlqueue.workers.version
    is 'of sqlqueue';
comment on column sqlqueue.workers.queues
    is 'the queues it serves, in order';
comment on column sqlqueue.workers.tasks
    is 'the tasks it knows';
comment on column sqlqueue.workers.slots
    is 'jobs it runs at a time';
comment on column sqlqueue.workers.busy
    is 'jobs it holds';
comment on column sqlqueue.workers.started_at
    is 'when it registered';
comment on column sqlqueue.workers.heartbeat_at
    is 'last sign of life';
comment on column sqlqueue.workers.liveness
    is 'alive, draining, late (silent for two beats) or dead (for its ttl)';
comment on column sqlqueue.workers.rss_bytes
    is 'memory of its process';
comment on column sqlqueue.workers.cpu
    is 'cores that its process used between its last two beats';
comment on column sqlqueue.workers.jobs_done
    is 'runs that have ended in it';
comment on column sqlqueue.workers.running
    is 'the jobs it holds, at most 100, oldest first';

comment on view sqlqueue.tasks
    is 'Tasks that workers know, or that had jobs within an hour';
comment on column sqlqueue.tasks.task
    is 'the task';
comment on column sqlqueue.tasks.queues
    is 'where its jobs were';
comment on column sqlqueue.tasks.paused_at
    is 'since when it is paused; null: it is not';
comment on column sqlqueue.tasks.succeeded_1h
    is 'jobs that succeeded in the last hour';
comment on column sqlqueue.tasks.failed_1h
    is 'jobs that failed';
comment on column sqlqueue.tasks.retried_1h
    is 'runs that failed and left attempts';
comment on column sqlqueue.tasks.failed_share
    is 'of those that ended; null: none did';
comment on column sqlqueue.tasks.ran_p50
    is 'how long half of its runs took at most';
comment on column sqlqueue.tasks.ran_p95
    is 'how long 95 % took';
comment on column sqlqueue.tasks.ran_p99
    is 'how long 99 % took';
comment on column sqlqueue.tasks.is_known
    is 'whether a live worker has it';

comment on view sqlqueue.minutes
    is 'What came and went, minute by minute, of the last two days';
comment on column sqlqueue.minutes.at
    is 'beginning of the minute';
comment on column sqlqueue.minutes.queue
    is 'the queue';
comment on column sqlqueue.minutes.task
    is 'the task';
comment on column sqlqueue.minutes.enqueued
    is 'jobs enqueued';
comment on column sqlqueue.minutes.started
    is 'runs that ended';
comment on column sqlqueue.minutes.succeeded
    is 'jobs that succeeded';
comment on column sqlqueue.minutes.failed
    is 'jobs that failed, also by timeout or crash, or expired';
comment on column sqlqueue.minutes.retried
    is 'runs that failed and left attempts';
comment on column sqlqueue.minutes.cancelled
    is 'jobs that were cancelled';
comment on column sqlqueue.minutes.waited_hist
    is 'histogram of waits; bucket i, from 0, ends at 2^(i/2) ms';
comment on column sqlqueue.minutes.ran_hist
    is 'histogram of how long runs took';

comment on view sqlqueue.hours
    is 'What came and went, hour by hour, as long as history is kept';
comment on column sqlqueue.hours.at
    is 'beginning of the hour';
comment on column sqlqueue.hours.queue
    is 'the queue';
comment on column sqlqueue.hours.task
    is 'the task';
comment on column sqlqueue.hours.enqueued
    is 'jobs enqueued';
comment on column sqlqueue.hours.started
    is 'runs that ended';
comment on column sqlqueue.hours.succeeded
    is 'jobs that succeeded';
comment on column sqlqueue.hours.failed
    is 'jobs that failed, also by timeout or crash, or expired';
comment on column sqlqueue.hours.retried
    is 'runs that failed and left attempts';
comment on column sqlqueue.hours.cancelled
    is 'jobs that were cancelled';
comment on column sqlqueue.hours.waited_hist
    is 'histogram of waits; bucket i, from 0, ends at 2^(i/2) ms';
comment on column sqlqueue.hours.ran_hist
    is 'histogram of how long runs took';

comment on view sqlqueue.depths
    is 'The level of each queue, sampled each minute; of old days each hour';
comment on column sqlqueue.depths.at
    is 'when';
comment on column sqlqueue.depths.queue
    is 'the queue';
comment on column sqlqueue.depths.ready
    is 'jobs that might run then';
comment on column sqlqueue.depths.waiting
    is 'jobs that waited under a policy';
comment on column sqlqueue.depths.scheduled
    is 'jobs that might run later';
comment on column sqlqueue.depths.running
    is 'jobs that ran';
comment on column sqlqueue.depths.oldest_wait
    is 'of those at the heads of its lanes';

comment on view sqlqueue.counters
    is 'The sums of all that came and went since the beginning: they never fall';
comment on column sqlqueue.counters.queue
    is 'the queue';
comment on column sqlqueue.counters.task
    is 'the task';
comment on column sqlqueue.counters.enqueued
    is 'jobs enqueued';
comment on column sqlqueue.counters.started
    is 'runs that ended';
comment on column sqlqueue.counters.succeeded
    is 'jobs that succeeded';
comment on column sqlqueue.counters.failed
    is 'jobs that failed, also by timeout or crash, or expired';
comment on column sqlqueue.counters.retried
    is 'runs that failed and left attempts';
comment on column sqlqueue.counters.cancelled
    is 'jobs that were cancelled';
comment on column sqlqueue.counters.waited_hist
    is 'histogram of waits; bucket i, from 0, ends at 2^(i/2) ms';
comment on column sqlqueue.counters.ran_hist
    is 'histogram of how long runs took';

comment on view sqlqueue.totals
    is 'The live snapshot: one row, one document a topic';
comment on column sqlqueue.totals.at
    is 'when';
comment on column sqlqueue.totals.overview
    is 'the sums';
comment on column sqlqueue.totals.queues
    is 'a level and rate for each queue';
comment on column sqlqueue.totals.workers
    is 'the live workers';
comment on column sqlqueue.totals.flow
    is 'per minute of the last hour: [epoch, enqueued, succeeded, failed]';

comment on view sqlqueue.storage
    is 'The size of each table, its partitions included';
comment on column sqlqueue.storage."table"
    is 'the table';
comment on column sqlqueue.storage.live
    is 'rows, as estimated by the server';
comment on column sqlqueue.storage.dead
    is 'dead rows, as estimated';
comment on column sqlqueue.storage.bytes
    is 'without indexes';
comment on column sqlqueue.storage.index_bytes
    is 'of the indexes';
comment on column sqlqueue.storage.vacuumed_at
    is 'the last vacuum of any part';

comment on view sqlqueue.health
    is 'What is well and what is not: a check in each row';
comment on column sqlqueue.health.place
    is 'the order';
comment on column sqlqueue.health.name
    is 'the check';
comment on column sqlqueue.health.is_ok
    is 'whether it is well';
comment on column sqlqueue.health.level
    is 'ok, warn, error, or unknown for lack of rights';
comment on column sqlqueue.health.value
    is 'what was found';
comment on column sqlqueue.health.detail
    is 'what that means';
comment on column sqlqueue.health.fix
    is 'a command or statement that helps';

comment on view sqlqueue.counts
    is 'How many jobs there are, exactly: reads all that have not ended';
comment on column sqlqueue.counts.queue
    is 'the queue';
comment on column sqlqueue.counts.state
    is 'ready, waiting, scheduled or running';
comment on column sqlqueue.counts.jobs
    is 'how many';

comment on view sqlqueue.metrics
    is 'What the page for Prometheus says: a sample in each row';
comment on column sqlqueue.metrics.family
    is 'the metric, without its prefix sqlqueue_';
comment on column sqlqueue.metrics.kind
    is 'gauge, counter or histogram';
comment on column sqlqueue.metrics.says
    is 'what it measures';
comment on column sqlqueue.metrics.name
    is 'the sample: the metric, with a suffix if it is part of a histogram';
comment on column sqlqueue.metrics.labels
    is 'what it is of; tasks beyond the 200 with the most jobs are one, other';
comment on column sqlqueue.metrics.value
    is 'the number';

comment on column sqlqueue.schedules.next_at
    is 'the next instant; null: to be found by a worker, or none';
comment on column sqlqueue.schedules.queue
    is 'where its jobs go';
comment on column sqlqueue.schedules.is_enabled
    is 'whether it is fired';
comment on column sqlqueue.schedules.last_job_id
    is 'the job of the last instant';
comment on column sqlqueue.schedules.last_state
    is 'the state of that job';
comment on column sqlqueue.schedules.is_queue_paused
    is 'whether its queue is paused';
comment on column sqlqueue.schedules.source
    is 'code or database';

comment on column sqlqueue.jobs.unique_key
    is 'what it alone may hold';
comment on column sqlqueue.jobs.fingerprint
    is 'the cause of its failure, see failures';

comment on view sqlqueue.ended is
    'The jobs that have ended; quick for the newest, by `order by id desc limit …`';
do $$
declare
    name text;
begin
    for name in
        select attname from pg_attribute
        where attrelid = 'sqlqueue.ended'::regclass and attnum > 0 and attname <> 'outcome'
    loop
        execute format(
            'comment on column sqlqueue.ended.%I is %L', name,
            (
                select col_description(attrelid, attnum) from pg_attribute
                where attrelid = 'sqlqueue.jobs'::regclass and attname = name
            )
        );
    end loop;
end
$$;
comment on column sqlqueue.ended.outcome is
    'How its last run ended: succeeded, failed, timed_out, crashed, cancelled or expired';
comment on column sqlqueue.live.unique_key
    is 'what it alone may hold';

comment on column sqlqueue.runs.fingerprint
    is 'the cause of its failure, see failures';
"""

# What there was before: the views, and the functions that were replaced.
BEFORE = r"""
create view sqlqueue.jobs as
select
    job.id, coalesce(place.queue, job.queue) as queue, job.task, place.state, place.reason,
    coalesce(place.priority, job.priority) as priority, job.args, job.tags, job.headers, job.key,
    job.created_at, place.due_at, job.expires_at, place.started_at, place.ended_at, place.run,
    place.attempt, job.attempts, place.crashes, place.worker_id, place.waited, place.ran,
    (
        select log.progress
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as progress,
    (
        select log.message
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as note,
    place.result, place.error_type, place.error, place.traceback, job.description, job.timeout
from (
    select
        job_id, 'ready' as state, case when is_suspect then 'suspect' end as reason, queue,
        priority, due_at, cast(null as timestamptz) as started_at,
        cast(null as timestamptz) as ended_at, run, failures + 1 as attempt, crashes,
        cast(null as bigint) as worker_id, now() - due_at as waited,
        cast(null as interval) as ran, cast(null as jsonb) as result,
        cast(null as text) as error_type, cast(null as text) as error,
        cast(null as text) as traceback
    from sqlqueue.ready
    union all
    select
        job_id, 'waiting', 'policy', queue, priority, due_at, null, null, run, failures + 1,
        crashes, null, now() - due_at, null, null, null, null, null
    from sqlqueue.waiting
    union all
    select
        job_id, 'scheduled', reason, queue, priority, due_at, null, null, run, failures + 1,
        crashes, null, null, null, null, null, null, null
    from sqlqueue.scheduled
    union all
    select
        job_id, 'running', null, queue, priority, due_at, claimed_at, null, run, failures + 1,
        crashes, worker_id, claimed_at - due_at, now() - claimed_at, null, null, null, null
    from sqlqueue.lease
    union all
    select
        job_id, 'succeeded', null, null, null, due_at, started_at, ended_at, run,
        cast(attempt as integer), crashes, worker_id, started_at - due_at,
        make_interval(secs => ran), result, null, null, null
    from sqlqueue.run
    where is_final and outcome = 'succeeded'
    union all
    select
        job_id, 'failed', outcome, null, null, due_at, started_at, ended_at, run,
        cast(attempt as integer), crashes, worker_id, started_at - due_at,
        make_interval(secs => ran), null, error_type, error, traceback
    from sqlqueue.run
    where is_final and outcome in ('failed', 'timed_out', 'crashed')
    union all
    select
        job_id, 'cancelled', null, null, null, due_at, started_at, ended_at, run,
        cast(attempt as integer), crashes, worker_id, started_at - due_at,
        make_interval(secs => ran), null, error_type, error, traceback
    from sqlqueue.run
    where is_final and outcome = 'cancelled'
    union all
    select
        job_id, 'expired', null, null, null, due_at, started_at, ended_at, run,
        cast(attempt as integer), crashes, worker_id, started_at - due_at,
        make_interval(secs => ran), null, error_type, error, traceback
    from sqlqueue.run
    where is_final and outcome = 'expired'
) as place
join sqlqueue.job on job.id = place.job_id;
comment on view sqlqueue.jobs is 'Every job, once, in the state it is in';
comment on column sqlqueue.jobs.id
    is 'the job';
comment on column sqlqueue.jobs.queue
    is 'the queue it is in, or was enqueued in';
comment on column sqlqueue.jobs.task
    is 'name of the registered function';
comment on column sqlqueue.jobs.state
    is 'scheduled, waiting, ready, running, succeeded, failed, cancelled or expired';
comment on column sqlqueue.jobs.reason
    is 'why it is in this state: delay, retry, snooze; policy; suspect; failed, timed_out, crashed';
comment on column sqlqueue.jobs.priority
    is '-100 to 100, small is urgent';
comment on column sqlqueue.jobs.args
    is 'arguments by name; those that have none in a list under "*"';
comment on column sqlqueue.jobs.tags
    is 'for people and tools';
comment on column sqlqueue.jobs.headers
    is 'for tools: strings by name';
comment on column sqlqueue.jobs.key
    is 'what limits, shares and order go by';
comment on column sqlqueue.jobs.created_at
    is 'start of the transaction that enqueued it';
comment on column sqlqueue.jobs.due_at
    is 'when it may start, or might have';
comment on column sqlqueue.jobs.expires_at
    is 'ends as expired unless started by then';
comment on column sqlqueue.jobs.started_at
    is 'when its last run was claimed';
comment on column sqlqueue.jobs.ended_at
    is 'when its last run ended it';
comment on column sqlqueue.jobs.run
    is 'number of its last run, 0 before the first';
comment on column sqlqueue.jobs.attempt
    is 'failures so far, plus one';
comment on column sqlqueue.jobs.attempts
    is 'runs that may fail, the first included';
comment on column sqlqueue.jobs.crashes
    is 'runs that took their worker down';
comment on column sqlqueue.jobs.worker_id
    is 'the worker of its last run';
comment on column sqlqueue.jobs.waited
    is 'from when it was due until its last run was claimed, or until now';
comment on column sqlqueue.jobs.ran
    is 'how long its last run took, or has taken';
comment on column sqlqueue.jobs.progress
    is 'percent of its work that is done, by what it said last';
comment on column sqlqueue.jobs.note
    is 'what it said of that';
comment on column sqlqueue.jobs.result
    is 'what the task returned';
comment on column sqlqueue.jobs.error_type
    is 'class of the exception, or a plain reason';
comment on column sqlqueue.jobs.error
    is 'its message';
comment on column sqlqueue.jobs.traceback
    is 'its traceback';
comment on column sqlqueue.jobs.description
    is 'for people';
comment on column sqlqueue.jobs.timeout
    is 'longest running time of one run';
create view sqlqueue.live as
select
    job.id, place.queue, job.task, place.state, place.reason, place.priority, job.args, job.tags,
    job.headers, job.key, job.created_at, place.due_at, job.expires_at, place.started_at,
    place.run,
    place.attempt, job.attempts, place.crashes, place.worker_id, place.waited, place.ran,
    (
        select log.progress
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as progress,
    (
        select log.message
        from sqlqueue.log
        where log.job_id = place.job_id and log.progress is not null
        order by log.run desc, log.seq desc
        limit 1
    ) as note,
    job.description, job.timeout
from (
    select
        job_id, 'ready' as state, case when is_suspect then 'suspect' end as reason, queue,
        priority, due_at, cast(null as timestamptz) as started_at, run, failures + 1 as attempt,
        crashes, cast(null as bigint) as worker_id, now() - due_at as waited,
        cast(null as interval) as ran
    from sqlqueue.ready
    union all
    select
        job_id, 'waiting', 'policy', queue, priority, due_at, null, run, failures + 1, crashes,
        null, now() - due_at, null
    from sqlqueue.waiting
    union all
    select
        job_id, 'scheduled', reason, queue, priority, due_at, null, run, failures + 1, crashes,
        null, null, null
    from sqlqueue.scheduled
    union all
    select
        job_id, 'running', null, queue, priority, due_at, claimed_at, run, failures + 1, crashes,
        worker_id, claimed_at - due_at, now() - claimed_at
    from sqlqueue.lease
) as place
join sqlqueue.job on job.id = place.job_id;
comment on view sqlqueue.live is 'The jobs that have not ended; quick however long the history';
comment on column sqlqueue.live.id
    is 'the job';
comment on column sqlqueue.live.queue
    is 'the queue it is in';
comment on column sqlqueue.live.task
    is 'name of the registered function';
comment on column sqlqueue.live.state
    is 'scheduled, waiting, ready or running';
comment on column sqlqueue.live.reason
    is 'why it is in this state: delay, retry, snooze, policy or suspect';
comment on column sqlqueue.live.priority
    is '-100 to 100, small is urgent';
comment on column sqlqueue.live.args
    is 'arguments by name; those that have none in a list under "*"';
comment on column sqlqueue.live.tags
    is 'for people and tools';
comment on column sqlqueue.live.headers
    is 'for tools: strings by name';
comment on column sqlqueue.live.key
    is 'what limits, shares and order go by';
comment on column sqlqueue.live.created_at
    is 'start of the transaction that enqueued it';
comment on column sqlqueue.live.due_at
    is 'when it may start, or might have';
comment on column sqlqueue.live.expires_at
    is 'ends as expired unless started by then';
comment on column sqlqueue.live.started_at
    is 'when its last run was claimed';
comment on column sqlqueue.live.run
    is 'number of its last run, 0 before the first';
comment on column sqlqueue.live.attempt
    is 'failures so far, plus one';
comment on column sqlqueue.live.attempts
    is 'runs that may fail, the first included';
comment on column sqlqueue.live.crashes
    is 'runs that took their worker down';
comment on column sqlqueue.live.worker_id
    is 'the worker of its last run';
comment on column sqlqueue.live.waited
    is 'from when it was due until its last run was claimed, or until now';
comment on column sqlqueue.live.ran
    is 'how long its last run took, or has taken';
comment on column sqlqueue.live.progress
    is 'percent of its work that is done, by what it said last';
comment on column sqlqueue.live.note
    is 'what it said of that';
comment on column sqlqueue.live.description
    is 'for people';
comment on column sqlqueue.live.timeout
    is 'longest running time of one run';
create view sqlqueue.runs as
select
    job_id, run, cast(attempt as integer) as attempt, worker_id, started_at, ended_at,
    make_interval(secs => ran) as ran,
    outcome, is_final as final, result, error_type, error, traceback
from sqlqueue.run
union all
select
    job_id, run, failures + 1, worker_id, claimed_at, null, now() - claimed_at,
    'running', false, null, null, null, null
from sqlqueue.lease;
comment on view sqlqueue.runs is 'Every run of every job, ended or running';
comment on column sqlqueue.runs.job_id
    is 'the job';
comment on column sqlqueue.runs.run
    is '1 for the first; with the job its identity and its fence';
comment on column sqlqueue.runs.attempt
    is 'failures before it, plus one';
comment on column sqlqueue.runs.worker_id
    is 'the worker that ran it';
comment on column sqlqueue.runs.started_at
    is 'when it was claimed; null: ended without a run';
comment on column sqlqueue.runs.ended_at
    is 'when it ended; null: it is running';
comment on column sqlqueue.runs.ran
    is 'how long it took in the task, or has taken since it was claimed';
comment on column sqlqueue.runs.outcome
    is 'running, succeeded, failed, timed_out, crashed, snoozed, returned, cancelled or expired';
comment on column sqlqueue.runs.final
    is 'whether it ended its job';
comment on column sqlqueue.runs.result
    is 'what the task returned';
comment on column sqlqueue.runs.error_type
    is 'class of the exception, or a plain reason';
comment on column sqlqueue.runs.error
    is 'its message';
comment on column sqlqueue.runs.traceback
    is 'its traceback';
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
create view sqlqueue.schedules as
select
    name, task, cron, every, tz, missed, next_at, last_at, problem, paused_at, paused_by,
    paused_why, resumes_at
from sqlqueue.schedule;
comment on view sqlqueue.schedules is 'When jobs are enqueued by themselves';
comment on column sqlqueue.schedules.name
    is 'for people';
comment on column sqlqueue.schedules.task
    is 'the task';
comment on column sqlqueue.schedules.cron
    is 'a cron line or alias; null: at an interval';
comment on column sqlqueue.schedules.every
    is 'the interval, counted from the year 2000 in UTC';
comment on column sqlqueue.schedules.tz
    is 'the time zone of the cron line';
comment on column sqlqueue.schedules.missed
    is 'which instants without a worker are made up for: latest, all or none';
comment on column sqlqueue.schedules.next_at
    is 'the next instant; null: to be found by a worker; infinity: none';
comment on column sqlqueue.schedules.last_at
    is 'the last instant that was fired';
comment on column sqlqueue.schedules.problem
    is 'why it cannot be fired; null: it can';
comment on column sqlqueue.schedules.paused_at
    is 'since when it is not fired; null: not paused';
comment on column sqlqueue.schedules.paused_by
    is 'who paused it';
comment on column sqlqueue.schedules.paused_why
    is 'why';
comment on column sqlqueue.schedules.resumes_at
    is 'when the pause ends by itself; null: never';
create or replace function sqlqueue.rescue(batch integer, seen_dead bigint) returns table (
    job_id text, run integer, worker_id bigint, is_last boolean
)
language sql volatile
as $$
    -- From here on such a worker can neither beat nor claim, and its leases are orphans.
    update sqlqueue.worker
    set died_at = now()
    where id = any (array(
        select id
        from sqlqueue.worker
        where died_at is null
          and (heartbeat_at < now() - ttl or id = rescue.seen_dead)
        for update skip locked
    ));
    select
        cast(orphan.job_id as text) as job_id,
        orphan.run,
        orphan.worker_id,
        coalesce(orphan.crashes + 1 >= job.max_crashes, true) as is_last
    from sqlqueue.worker
    cross join lateral (  -- never the other way round, which reads every lease
        select job_id, run, worker_id, crashes
        from sqlqueue.lease
        where worker_id = worker.id
        limit rescue.batch
        for update skip locked
    ) as orphan
    left join sqlqueue.job on job.id = orphan.job_id
    where worker.died_at > now() - interval '10 minutes'  -- others are dug up by tidy
    limit rescue.batch
$$;
create or replace function sqlqueue.cancel_unstarted(job_id uuid, reason text) returns boolean
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
"""


def upgrade() -> None:
    for sql in (TABLES, FUNCTIONS, BACKFILL, VIEWS):
        op.execute(in_schema(sql))


def downgrade() -> None:
    op.execute(
        in_schema(
            "drop function sqlqueue.flow_of, sqlqueue.past_retention;"
            "drop view sqlqueue.metrics, sqlqueue.counts, sqlqueue.health, sqlqueue.storage,"
            " sqlqueue.totals,"
            " sqlqueue.counters,"
            " sqlqueue.depths, sqlqueue.hours, sqlqueue.minutes, sqlqueue.tasks, sqlqueue.workers,"
            " sqlqueue.failures, sqlqueue.schedules, sqlqueue.queues, sqlqueue.jobs,"
            " sqlqueue.live, sqlqueue.ended, sqlqueue.runs;"
            "drop aggregate sqlqueue.hist_sum(bigint[]);"
            "drop function sqlqueue.why, sqlqueue.queue_wait, sqlqueue.queue_lag,"
            " sqlqueue.set_retention, sqlqueue.remove_schedule, sqlqueue.mute_failures,"
            " sqlqueue.tell_worker, sqlqueue.move_job, sqlqueue.put_off, sqlqueue.hurry_job,"
            " sqlqueue.delete_job, sqlqueue.discard_job, sqlqueue.edit, sqlqueue.change,"
            " sqlqueue.note,"
            " sqlqueue.fold, sqlqueue.count_enqueued, sqlqueue.observe, sqlqueue.count_runs,"
            " sqlqueue.unregister, sqlqueue.beat, sqlqueue.unknown_since, sqlqueue.keep_lines,"
            " sqlqueue.job_states, sqlqueue.held, sqlqueue.fingerprint, sqlqueue.frame,"
            " sqlqueue.hist_quantile, sqlqueue.hist_add;"
        )
    )
    op.execute(in_schema(BEFORE))
    op.execute(
        in_schema(
            "drop table sqlqueue.flow, sqlqueue.total, sqlqueue.depth, sqlqueue.mute;"
            "drop index sqlqueue.job_created;"
            "alter table sqlqueue.setting drop column observed_at;"
            "alter table sqlqueue.worker drop column told;"
            "alter table sqlqueue.run drop column queue, drop column task,"
            " drop column fingerprint;"
        )
    )


def in_schema(sql: str) -> str:
    """Put the schema of this installation in the place of the name `sqlqueue`."""
    schema = op.get_context().version_table_schema
    return sql.replace("sqlqueue.", f"{schema}.").replace("'sqlqueue'", f"'{schema}'")
