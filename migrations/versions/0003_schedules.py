"""Add schedules: jobs that are enqueued by themselves.

adds    the tables schedule and tick, and their functions
locks   nothing that is in use
time    constant; gives up after lock_timeout (2 s) and can be run again
undo    drops the schedules and what is known of their past
"""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = r"""
create table sqlqueue.schedule (
    name text not null,
    task text not null,
    args jsonb default '{}' not null,
    options jsonb default '{}' not null,
    cron text,
    every interval,
    tz text default 'UTC' not null,
    missed text default 'latest' not null,
    is_declared boolean default false not null,
    next_at timestamptz,
    last_at timestamptz,
    problem text,
    paused_at timestamptz,
    paused_by text,
    paused_why text,
    resumes_at timestamptz,
    primary key (name),
    check (num_nonnulls(cron, every) = 1),
    check (missed in ('latest', 'all', 'none'))
);
create index schedule_next on sqlqueue.schedule (next_at);
comment on table sqlqueue.schedule
    is 'When jobs are enqueued by themselves: change a row at any time, and set its next_at null';
comment on column sqlqueue.schedule.name
    is 'for people';
comment on column sqlqueue.schedule.task
    is 'the task';
comment on column sqlqueue.schedule.args
    is 'arguments, as those of a job';
comment on column sqlqueue.schedule.options
    is 'parameters of the function enqueue by name, as text';
comment on column sqlqueue.schedule.cron
    is 'a cron line or alias; null: at an interval';
comment on column sqlqueue.schedule.every
    is 'the interval, counted from the year 2000 in UTC';
comment on column sqlqueue.schedule.tz
    is 'the time zone of the cron line';
comment on column sqlqueue.schedule.missed
    is 'which instants without a worker are made up for: latest, all or none';
comment on column sqlqueue.schedule.is_declared
    is 'declared in code: paused when the code declares it no more';
comment on column sqlqueue.schedule.next_at
    is 'the next instant; null: to be found by a worker; infinity: none';
comment on column sqlqueue.schedule.last_at
    is 'the last instant that was fired';
comment on column sqlqueue.schedule.problem
    is 'why it cannot be fired; null: it can';
comment on column sqlqueue.schedule.paused_at
    is 'since when it is not fired; null: not paused';
comment on column sqlqueue.schedule.paused_by
    is 'who paused it';
comment on column sqlqueue.schedule.paused_why
    is 'why';
comment on column sqlqueue.schedule.resumes_at
    is 'when the pause ends by itself; null: never';

create table sqlqueue.tick (
    schedule text not null,
    at timestamptz not null,
    job_id uuid,
    primary key (schedule, at)
);
comment on table sqlqueue.tick
    is 'The instants that were fired: one row, so one job, for each';
comment on column sqlqueue.tick.schedule
    is 'name of the schedule';
comment on column sqlqueue.tick.at
    is 'the instant';
comment on column sqlqueue.tick.job_id
    is 'the job that was enqueued; null: the queue was full';
"""

FUNCTIONS = r"""
create function sqlqueue.fire_at(name text, at timestamptz) returns uuid
language plpgsql volatile
as $$
#variable_conflict use_column
declare
    given sqlqueue.schedule;
    made uuid;
begin
    select schedule.* into strict given from sqlqueue.schedule where name = fire_at.name;
    insert into sqlqueue.tick (schedule, at) values (given.name, fire_at.at)
    on conflict do nothing;
    if not found then
        return null;
    end if;
    begin
        made := sqlqueue.enqueue(
            given.task,
            given.args,
            queue => coalesce(given.options ->> 'queue', 'default'),
            priority => coalesce(cast(given.options ->> 'priority' as integer), 0),
            timeout => case
                when given.options ? 'timeout' then cast(given.options ->> 'timeout' as interval)
                else interval '5 minutes'
            end,
            attempts => coalesce(cast(given.options ->> 'attempts' as integer), 10),
            retry => cast(given.options ->> 'retry' as jsonb),
            max_crashes => coalesce(cast(given.options ->> 'max_crashes' as integer), 3),
            keep => coalesce(cast(given.options ->> 'keep' as boolean), true),
            expires_in => cast(given.options ->> 'expires_in' as interval),
            executor => given.options ->> 'executor',
            tags => cast(given.options ->> 'tags' as text[]),
            description => given.options ->> 'description',
            headers => coalesce(cast(given.options ->> 'headers' as jsonb), '{}')
                || jsonb_build_object('schedule', given.name, 'at', fire_at.at::text),
            key => given.options ->> 'key',
            weight => cast(given.options ->> 'weight' as integer)
        );
    exception
        when configuration_limit_exceeded then
            return null;
    end;
    update sqlqueue.tick
    set job_id = made
    where schedule = given.name and tick.at = fire_at.at;
    return made;
end
$$;
comment on function sqlqueue.fire_at is
    'Enqueues the job of a schedule for an instant; null: it has been, or the queue is full';

create function sqlqueue.run_schedule(name text, at timestamptz default now()) returns uuid
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    made constant uuid := sqlqueue.fire_at(name, at);
begin
    perform sqlqueue.note_action('run_schedule', 'schedule ' || name, made is not null);
    return made;
end
$$;
comment on function sqlqueue.run_schedule is
    'Runs a schedule for an operator: see fire_at';

create function sqlqueue.due_schedules()
returns table (
    name text, cron text, every interval, tz text, missed text, next_at timestamptz,
    now timestamptz
)
language sql volatile
as $$
    select name, cron, every, tz, missed, next_at, now()
    from sqlqueue.schedule
    where (next_at <= now() or next_at is null)
      and (paused_at is null or resumes_at <= now())
    order by next_at
    limit 20
    for update skip locked
$$;
comment on function sqlqueue.due_schedules is 'The schedules to be fired or planned, locked';

create function sqlqueue.fire(
    name text, instants timestamptz[], next_at timestamptz, problem text
) returns bigint
language plpgsql volatile
as $$
#variable_conflict use_column
declare
    fired bigint;
begin
    select count(sqlqueue.fire_at(fire.name, at)) into fired from unnest(instants) as at;
    update sqlqueue.schedule
    set next_at = coalesce(fire.next_at, 'infinity'),
        last_at = coalesce(instants[cardinality(instants)], last_at),
        problem = fire.problem
    where name = fire.name;
    delete from sqlqueue.tick
    where schedule = fire.name and at < now() - interval '400 days';
    return fired;
end
$$;
comment on function sqlqueue.fire is
    'Fires a schedule for some instants and says when it is to be fired next; returns how many';

create function sqlqueue.set_schedules(schedules jsonb, known text[]) returns void
language plpgsql volatile
as $$
#variable_conflict use_column
begin
    insert into sqlqueue.schedule as schedule (
        name, task, args, options, cron, every, tz, missed, is_declared
    )
    select name, task, args, options, cron, every, tz, missed, known is not null
    from jsonb_populate_recordset(null::sqlqueue.schedule, schedules)
    on conflict (name) do update
    set task = excluded.task,
        args = excluded.args,
        options = excluded.options,
        cron = excluded.cron,
        every = excluded.every,
        tz = excluded.tz,
        missed = excluded.missed,
        is_declared = excluded.is_declared,
        problem = null,
        next_at = case
            when (schedule.cron, schedule.every, schedule.tz)
                is not distinct from (excluded.cron, excluded.every, excluded.tz)
                and (schedule.paused_by is distinct from 'code')
            then schedule.next_at
        end,
        paused_at = case when schedule.paused_by = 'code' then null else schedule.paused_at end,
        paused_by = nullif(schedule.paused_by, 'code');
    if known is not null then
        update sqlqueue.schedule
        set paused_at = now(),
            paused_by = 'code',
            paused_why = 'it is not declared any more'
        where is_declared
          and paused_at is null
          and not schedules @> jsonb_build_array(jsonb_build_object('name', name))
          and (
              task = any (known)
              or not exists (
                  select
                  from sqlqueue.worker
                  where died_at is null and schedule.task = any (worker.tasks)
              )
          );
    end if;
end
$$;
comment on function sqlqueue.set_schedules is
    'Sets schedules; with the tasks known to the code, those it declares: the others are paused';

create function sqlqueue.promote(within interval, batch integer) returns table (
    queue text, priority smallint, moved bigint, is_rung boolean
)
language sql volatile
as $$
    with due as (
        delete from sqlqueue.scheduled
        where ctid = any (array(
            select ctid
            from sqlqueue.scheduled
            where due_at <= now()
              and due_at > coalesce(now() - promote.within, '-infinity')  -- steps over dead
            order by due_at
            limit promote.batch
            for update skip locked
        ))
        returning job_id, due_at, run, failures, crashes, priority, queue, admission
    ),
    held as (
        insert into sqlqueue.waiting (
            job_id, due_at, run, failures, crashes, priority, queue, flow, weight, rank
        )
        select
            due.job_id, due.due_at, due.run, due.failures, due.crashes, due.priority, due.queue,
            gate.flow, coalesce(job.weight, 1), sqlqueue.rank(due.due_at, due.priority, gate.ageing)
        from due
        join sqlqueue.job on job.id = due.job_id
        cross join lateral sqlqueue.gate(due.queue, job.task, job.key) as gate
        where due.admission = 0
          and exists (select from sqlqueue.policy)
        order by due.due_at
        returning job_id
    ),
    moved as (
        insert into sqlqueue.ready (
            job_id, due_at, run, failures, crashes, priority, queue, admission
        )
        select job_id, due_at, run, failures, crashes, priority, queue, admission
        from due
        where job_id not in (select job_id from held)
        order by due_at
    )
    select queue, priority, count(*) as moved, sqlqueue.ring(queue, cast(priority as text)) is null
    from due
    group by queue, priority
$$;
comment on function sqlqueue.promote is
    'Makes so many jobs ready, or has them wait, whose time has come; says how many in each lane';

create function sqlqueue.rescue(batch integer, seen_dead bigint) returns table (
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
comment on function sqlqueue.rescue is
    'Declares silent workers dead, and locks leases of the dead, for their runs to be ended';

create function sqlqueue.leases(worker bigint, within interval) returns table (
    job_id text, run integer, is_cancelled boolean
)
language sql stable
as $$
    select cast(lease.job_id as text), lease.run, exists (
        select from sqlqueue.cancel_request where cancel_request.job_id = lease.job_id
    )
    from sqlqueue.lease
    where worker_id = leases.worker
      and claimed_at > coalesce(now() - leases.within, '-infinity')  -- steps over dead
    union
    select cast(held.job_id as text), held.run, true
    from sqlqueue.cancel_request
    cross join lateral (  -- never the other way round, which reads every lease
        select job_id, run
        from sqlqueue.lease
        where lease.job_id = cancel_request.job_id and lease.worker_id = leases.worker
        limit 1
    ) as held
$$;
comment on function sqlqueue.leases is
    'What a worker has claimed within a time, and all it holds that is to be cancelled';

create function sqlqueue.arm(queues text[], worker bigint, patience interval) returns setof text
language sql volatile
as $$
    with old as (
        delete from sqlqueue.doorbell
        where ctid = any (array(
            select ctid
            from sqlqueue.doorbell
            where queue = any (arm.queues)
              and rings_until > now()
              and worker_id = arm.worker
            for update skip locked
        ))
    )
    insert into sqlqueue.doorbell (queue, rings_until, worker_id)
    select served.queue, now() + arm.patience, arm.worker
    from unnest(arm.queues) as served (queue)
    where not exists (
        select
        from sqlqueue.doorbell
        where doorbell.queue = served.queue
          and doorbell.rings_until > now()
          and doorbell.worker_id <> arm.worker
    )
    on conflict do nothing
    returning queue
$$;
comment on function sqlqueue.arm is
    'Hangs the bell of a worker at each of its queues that has none';

create function sqlqueue.disarm(queues text[], worker bigint) returns setof text
language sql volatile
as $$
    delete from sqlqueue.doorbell
    where ctid = any (array(
        select ctid
        from sqlqueue.doorbell
        where queue = any (disarm.queues)
          and rings_until > now()
          and worker_id = disarm.worker
        for update skip locked
    ))
    returning queue
$$;
comment on function sqlqueue.disarm is
    'Takes the bells of a worker away';

create function sqlqueue.lanes(queue text, known integer[], is_suspect boolean) returns table (
    queue text, priority smallint, is_suspect boolean
)
language sql stable
as $$
    select found.queue, found.priority, found.is_suspect
    from unnest(
        cast(-101 || lanes.known as integer[]),
        cast(lanes.known || 101 as integer[])
    ) as gap (low, high)
    cross join lateral (
        select queue, priority, is_suspect
        from sqlqueue.ready
        where queue = lanes.queue
          and is_suspect = lanes.is_suspect
          and priority > gap.low
          and priority < gap.high
        order by priority
        limit 1
    ) as found
$$;
comment on function sqlqueue.lanes is
    'Finds lanes of a queue between those known, one in each gap';

create function sqlqueue.next_due() returns interval
language sql stable
as $$
    select least(
        (
            select due_at
            from sqlqueue.scheduled
            where due_at > now()
              and due_at < now() + interval '1 day'
            order by due_at
            limit 1
        ),
        (
            select next_at
            from sqlqueue.schedule
            where next_at > now()
            order by next_at
            limit 1
        )
    ) - now() as wait
$$;
comment on function sqlqueue.next_due is
    'How long it is until the next job or schedule is due, if that is within a day';

revoke all on function
    sqlqueue.fire_at, sqlqueue.run_schedule, sqlqueue.due_schedules, sqlqueue.fire,
    sqlqueue.set_schedules, sqlqueue.promote, sqlqueue.rescue, sqlqueue.leases, sqlqueue.arm,
    sqlqueue.disarm, sqlqueue.lanes, sqlqueue.next_due
from public;
"""

VIEWS = r"""
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
"""


def upgrade() -> None:
    for sql in (TABLES, FUNCTIONS, VIEWS):
        op.execute(in_schema(sql))


def downgrade() -> None:
    op.execute(
        in_schema(
            "drop view sqlqueue.schedules;"
            "drop function sqlqueue.promote, sqlqueue.rescue, sqlqueue.leases, sqlqueue.arm,"
            " sqlqueue.disarm, sqlqueue.lanes, sqlqueue.next_due, sqlqueue.set_schedules,"
            " sqlqueue.fire, sqlqueue.run_schedule, sqlqueue.fire_at, sqlqueue.due_schedules;"
            "drop table sqlqueue.schedule, sqlqueue.tick;"
        )
    )


def in_schema(sql: str) -> str:
    """Put the schema of this installation in the place of the name `sqlqueue`."""
    schema = op.get_context().version_table_schema
    return sql.replace("sqlqueue.", f"{schema}.").replace("'sqlqueue'", f"'{schema}'")
