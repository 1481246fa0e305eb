-- Make the roles, and give each what it needs in one schema. Run it again after each migration.
--
-- sqlqueue_owner     owns everything; the migrator is a member
-- sqlqueue_enqueue   calls sqlqueue.enqueue, and nothing else
-- sqlqueue_worker    runs jobs: what the statements of sql/ need
-- sqlqueue_view      reads the views
-- sqlqueue_operator  reads the views, retries, cancels, pauses and limits; all of it is written down
--
-- Roles belong to the whole cluster, so their names do not change with the schema. Whoever runs
-- this has to own the schema and, the first time, be allowed to create roles.
do $$
declare
    made text;
begin
    foreach made in array array[
        'sqlqueue_owner', 'sqlqueue_enqueue', 'sqlqueue_worker', 'sqlqueue_view',
        'sqlqueue_operator'
    ] loop
        if to_regrole(made) is null then
            execute format('create role %I', made);
            if made = 'sqlqueue_view' then
                alter role sqlqueue_view set statement_timeout = '5s';
                alter role sqlqueue_view set default_transaction_read_only = on;
            end if;
        end if;
    end loop;
    if not pg_has_role('sqlqueue_operator', 'sqlqueue_view', 'usage') then
        grant sqlqueue_view to sqlqueue_operator;
    end if;
    if not pg_has_role('sqlqueue_owner', 'usage') then
        grant sqlqueue_owner to current_user;
    end if;
end
$$;

-- Whatever is not the owner's yet becomes so: what was made by hand, or by the last migration.
do $$
declare
    relation regclass;
    called regprocedure;
begin
    alter schema sqlqueue owner to sqlqueue_owner;
    for relation in
        select oid
        from pg_class
        where relnamespace = 'sqlqueue'::regnamespace
          and relkind in ('r', 'p', 'v')
          and relowner <> 'sqlqueue_owner'::regrole
    loop
        execute format('alter table %s owner to sqlqueue_owner', relation);
    end loop;
    for called in
        select oid
        from pg_proc
        where pronamespace = 'sqlqueue'::regnamespace
          and proowner <> 'sqlqueue_owner'::regrole
    loop
        execute format('alter function %s owner to sqlqueue_owner', called);
    end loop;
end
$$;

-- From here on each role gets exactly what is said here, whatever it had before.
revoke all on schema sqlqueue
    from public, sqlqueue_enqueue, sqlqueue_worker, sqlqueue_view, sqlqueue_operator;
revoke all on all tables in schema sqlqueue
    from public, sqlqueue_enqueue, sqlqueue_worker, sqlqueue_view, sqlqueue_operator;
revoke all on all sequences in schema sqlqueue
    from public, sqlqueue_enqueue, sqlqueue_worker, sqlqueue_view, sqlqueue_operator;
revoke all on all functions in schema sqlqueue
    from public, sqlqueue_enqueue, sqlqueue_worker, sqlqueue_view, sqlqueue_operator;
grant usage on schema sqlqueue
    to sqlqueue_enqueue, sqlqueue_worker, sqlqueue_view, sqlqueue_operator;

grant execute on function sqlqueue.enqueue to sqlqueue_enqueue;

grant select on
    sqlqueue.jobs, sqlqueue.live, sqlqueue.ended, sqlqueue.runs, sqlqueue.logs,
    sqlqueue.queues, sqlqueue.schedules, sqlqueue.actions, sqlqueue.failures, sqlqueue.workers, sqlqueue.tasks,
    sqlqueue.minutes, sqlqueue.hours, sqlqueue.depths, sqlqueue.counters, sqlqueue.totals,
    sqlqueue.storage, sqlqueue.health, sqlqueue.metrics, sqlqueue.counts
to sqlqueue_view;
grant execute on function
    sqlqueue.why, sqlqueue.queue_lag, sqlqueue.queue_wait, sqlqueue.hist_sum, sqlqueue.hist_add,
    sqlqueue.hist_quantile, sqlqueue.frame, sqlqueue.job_states, sqlqueue.flow_of,
    sqlqueue.past_retention
to sqlqueue_view;

grant execute on function
    sqlqueue.cancel, sqlqueue.retry, sqlqueue.pause, sqlqueue.set_policy, sqlqueue.run_schedule,
    sqlqueue.change, sqlqueue.note, sqlqueue.tell_worker, sqlqueue.mute_failures,
    sqlqueue.remove_schedule, sqlqueue.set_retention
to sqlqueue_operator;

-- A worker: rows that are locked `for update` need the right to update them.
grant select, insert, update, delete on
    sqlqueue.ready, sqlqueue.waiting, sqlqueue.scheduled, sqlqueue.lease, sqlqueue.unique_claim,
    sqlqueue.tick
to sqlqueue_worker;
grant select, insert, update on
    sqlqueue.worker, sqlqueue.turn, sqlqueue.bucket, sqlqueue.schedule
to sqlqueue_worker;
grant select, insert, delete on sqlqueue.admitted, sqlqueue.verdict to sqlqueue_worker;
grant select, update, delete on sqlqueue.doorbell to sqlqueue_worker;
grant select, insert on
    sqlqueue.job, sqlqueue.run, sqlqueue.log, sqlqueue.cancel_request, sqlqueue.doorbell
to sqlqueue_worker;
grant insert on sqlqueue.flow to sqlqueue_worker;
grant select, update on sqlqueue.policy to sqlqueue_worker;
grant select on
    sqlqueue.jobs, sqlqueue.queue, sqlqueue.share, sqlqueue.setting, sqlqueue.alembic_version
to sqlqueue_worker;
grant execute on function
    sqlqueue.enqueue, sqlqueue.gate, sqlqueue.rank, sqlqueue.uuid_at, sqlqueue.notify,
    sqlqueue.ring, sqlqueue.take_keys, sqlqueue.is_held, sqlqueue.cancel_job,
    sqlqueue.cancel_unstarted, sqlqueue.gated, sqlqueue.admit, sqlqueue.judge,
    sqlqueue.room_in, sqlqueue.take, sqlqueue.promote, sqlqueue.rescue, sqlqueue.leases,
    sqlqueue.arm, sqlqueue.disarm, sqlqueue.lanes, sqlqueue.next_due, sqlqueue.due_schedules,
    sqlqueue.set_schedules, sqlqueue.fire, sqlqueue.fire_at, sqlqueue.forget_keys, sqlqueue.tidy,
    sqlqueue.held, sqlqueue.job_states, sqlqueue.keep_lines, sqlqueue.unknown_since, sqlqueue.beat,
    sqlqueue.unregister, sqlqueue.count_runs, sqlqueue.fingerprint, sqlqueue.frame
to sqlqueue_worker;
