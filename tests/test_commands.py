"""The commands for seeing and steering: each writes what it says, and exits as it should."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sqlqueue import Policy, Queue, Retry, Schedule, current_run
from sqlqueue.cli import main
from sqlqueue.cli.watch import canned
from tests.harness import POLLING, SOON, rows, value, wait_until, work
from tests.test_cli import NOBODY, commands

ROOT = Path(__file__).parent.parent


class Shop:
    """A queue with some tasks, and the command line on its database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.queue = Queue(url)
        self.engine = self.queue.engine

        @self.queue.task(name="does", retry=Retry(attempts=1))
        def does(fails: bool = False, **more: Any) -> Any:
            current_run().log.info("begins")
            if fails:
                raise ValueError("no")
            return more or None

        self.does = does

    def run(self, *words: str, exits: int = 0, **given: Any) -> Result:
        result = CliRunner().invoke(main, ["--url", self.url, *words], **given)
        assert result.exit_code == exits, (result.output, result.exception)
        return result

    def json(self, *words: str, exits: int = 0) -> Any:
        return json.loads(self.run("--json", *words, exits=exits).stdout)

    def failed(self, count: int = 1) -> list[str]:
        made = [str(self.does.enqueue(True).id) for _ in range(count)]
        work(self.queue)
        return made

    def state(self, job: str) -> str:
        return str(value(self.engine, "select state from sqlqueue.jobs where id = :id", id=job))


@pytest.fixture
def shop(engine, migrated_url):
    shop = Shop(migrated_url)
    yield shop
    shop.engine.dispose()


AS_JSON = [
    "jobs list", "failures list", "queues list", "workers list", "tasks list",
    "schedules list", "stats", "stats --by task", "stats --exact", "sql --list",
    "sql stuck", "doctor", "config", "migrate status",
]  # fmt: skip


@pytest.mark.parametrize("words", AS_JSON)
def test_m23_json_is_one_document_and_stdout_only_data(shop, words) -> None:
    shop.failed()
    exits = 1 if words == "doctor" else 0  # the server of the tests has fsync off
    assert isinstance(shop.json(*words.split(), exits=exits), list | dict)


def test_m23_every_command_has_help_that_fits(shop) -> None:
    for name, _ in commands():
        told = CliRunner().invoke(main, [*name.split(), "--help"])
        assert told.exit_code == 0
        assert max(map(len, told.stdout.splitlines())) <= 80


# Jobs


def test_verbs_change_jobs_and_say_so(shop) -> None:
    (failed,) = shop.failed()
    shop.run("jobs", "discard", failed)
    assert shop.state(failed) == "cancelled"
    later = str(shop.does.using(delay=timedelta(hours=1)).enqueue().id)
    shop.run("jobs", "run-now", later)
    due = "select due_at <= now() from sqlqueue.live where id = :id"
    assert value(shop.engine, due, id=later)
    shop.run("jobs", "move", "--to", "slow", later)
    shop.run("jobs", "priority", "7", later)
    place = "select queue, priority from sqlqueue.live where id = :id"
    assert rows(shop.engine, place, id=later) == [("slow", 7)]
    shop.run("jobs", "cancel", later, "--reason", "no more")
    assert (
        value(shop.engine, "select error from sqlqueue.jobs where id = :id", id=later) == "no more"
    )
    shop.run("jobs", "delete", later, failed, "--yes")
    assert value(shop.engine, "select count(*) from sqlqueue.jobs") == 0
    shop.run("jobs", "run-now", NOBODY, exits=5)
    acted = rows(shop.engine, "select distinct verb from sqlqueue.actions")
    assert {verb for (verb,) in acted} == {
        "discard", "run_now", "move", "priority", "cancel", "delete",
    }  # fmt: skip


def test_retries_are_spread_evenly(shop) -> None:
    shop.failed(4)
    shop.run("jobs", "retry", "--state", "failed", "--spread", "1h", "--yes")
    spread = (
        "select extract(epoch from due_at - min(due_at) over ()) from sqlqueue.scheduled order by 1"
    )
    found = [round(float(one)) for (one,) in rows(shop.engine, spread)]
    assert found == [0, 900, 1800, 2700]


def test_a_bulk_verb_takes_a_search_and_a_limit(shop) -> None:
    shop.failed(5)
    told = shop.run("jobs", "retry", "--where", "state:failed", "--limit", "2", "--yes")
    assert "retry 2 of 2 jobs" in told.stderr
    assert "there is no key foo" in shop.run("jobs", "list", "--where", "foo:1", exits=2).stderr
    assert value(shop.engine, "select affected from sqlqueue.actions") == 2


def test_a_job_is_edited(shop) -> None:
    (failed,) = shop.failed()
    made = shop.run("jobs", "edit", failed, "--args", '{"fails": false, "password": "x"}').stdout
    work(shop.queue)
    assert shop.state(made.strip()) == "succeeded"
    assert shop.state(failed) == "cancelled"
    shop.run("jobs", "edit", failed, "--args", "[]", exits=2)
    shop.run("jobs", "edit", NOBODY, "--args", "{}", exits=5)
    assert "hidden" in shop.run("jobs", "show", made.strip()).stdout
    other = shop.run("jobs", "edit", made.strip(), "--args", "{}", exits=2)
    assert "is succeeded" in other.stderr


def test_jobs_are_dumped_one_a_line(shop) -> None:
    jobs = shop.failed(3)
    lines = shop.run("jobs", "dump", "--where", "state:failed").stdout.splitlines()
    assert {json.loads(line)["id"] for line in lines} == set(jobs)


def test_a_log_is_followed_until_the_job_ends(shop) -> None:
    job = shop.does.enqueue()
    with shop.queue.worker("default", **POLLING):
        told = shop.run("--json", "jobs", "logs", str(job.id), "--follow")
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert [line["message"] for line in lines] in (["begins"], [])


def test_why_says_what_helps(shop) -> None:
    job = str(shop.does.enqueue().id)
    assert "no live worker serves queue" in shop.run("why", job).stdout
    assert shop.json("why", job)[-1]["reason"] == "no worker"
    shop.run("why", NOBODY, exits=5)


# Groups


def test_failures_are_retried_discarded_and_muted(shop) -> None:
    shop.failed(3)
    (row,) = shop.json("failures", "list")
    group = row["fingerprint"]
    assert (row["jobs"], row["source"]) == (3, "test_commands.py does")
    assert shop.json("failures", "show", group)["task"] == "does"
    shop.run("failures", "mute", group, "--for", "2h")
    assert shop.json("failures", "list")[0]["muted_until"]
    assert "would retry 3 of 3 jobs" in shop.run("failures", "retry", group, "--dry-run").stderr
    shop.run("failures", "retry", group, exits=1)
    shop.run("failures", "retry", group, "--yes")
    assert shop.json("failures", "list") == []
    work(shop.queue)
    shop.run("failures", "discard", "--all", "--yes")
    shop.run("failures", "discard", "--all", "--yes", exits=5)
    shop.run("failures", "retry", exits=2)
    shop.run("failures", "mute", "nobody", exits=5)


def test_queues_are_shown_and_purged(shop) -> None:
    shop.does.enqueue()
    shop.does.using(delay=timedelta(hours=1)).enqueue()
    assert shop.json("queues", "show", "default")["ready"] == 1
    shop.run("queues", "show", "nobody", exits=5)
    assert "would purge 2 of 2 jobs" in shop.run("queues", "purge", "default", "--dry-run").stderr
    shop.run("queues", "purge", "default", "--yes")
    assert value(shop.engine, "select count(*) from sqlqueue.job") == 0


def test_tasks_are_paused(shop) -> None:
    shop.queue.set_policy(Policy(), task="does")
    shop.run("tasks", "pause", "does", "--why", "upgrade", "--for", "1h")
    assert shop.json("tasks", "show", "does")["paused_at"]
    shop.run("tasks", "resume", "does")
    assert shop.json("tasks", "show", "does")["paused_at"] is None
    shop.run("tasks", "resume", "nobody", exits=5)


def test_workers_are_told_to_end(shop) -> None:
    options = POLLING | {"ttl": timedelta(seconds=1)}
    with shop.queue.worker("default", **options) as worker:
        (row,) = shop.json("workers", "list")
        assert (row["id"], row["liveness"]) == (worker.id, "alive")
        assert shop.json("workers", "show", str(worker.id))["slots"] == 20
        shop.run("workers", "drain", str(worker.id))
        assert worker.stopped.wait(SOON.total_seconds())
    shop.run("workers", "stop", str(worker.id), exits=5)


def test_schedules_are_added_and_removed(shop) -> None:
    shop.run("schedules", "add", "nightly", "does", "fails:=true", "--cron", "30 2 * * *")
    shop.run("schedules", "add", "often", "other.task", "x=1", "--every", "10m", "--queue", "q")
    found = {row["name"]: row for row in shop.json("schedules", "list")}
    assert found["nightly"]["cron"] == "30 2 * * *"
    assert (found["often"]["every"], found["often"]["queue"]) == (600.0, "q")
    assert shop.json("schedules", "show", "often")["source"] == "database"
    shop.run("schedules", "remove", "often", exits=1)
    shop.run("schedules", "remove", "often", "--yes")
    shop.run("schedules", "remove", "often", "--yes", exits=5)
    shop.run("schedules", "add", "wrong", "does", exits=2)
    shop.queue.set_schedule("again", shop.does.s(), Schedule(cron="@hourly"))
    assert len(shop.json("schedules", "list")) == 2


def test_a_schedule_without_a_next_instant_is_listed(shop) -> None:
    shop.run("schedules", "add", "often", "other.task", "--every", "10m")
    rows(shop.engine, "update sqlqueue.schedule set next_at = 'infinity'")
    assert shop.json("schedules", "list")[0]["next_at"] is None


# Watching


def test_stats_count_by_queue_and_task(shop) -> None:
    shop.failed(2)
    shop.does.enqueue()
    assert shop.json("stats")[0]["ready"] == 1
    assert shop.json("stats", "--by", "task")[0]["failed_1h"] == 2
    assert shop.json("stats", "--exact") == [{"queue": "default", "state": "ready", "jobs": 1}]


def test_top_shows_what_there_is(shop) -> None:
    shop.failed(2)
    shop.does.enqueue()
    told = shop.run("top", "--for", "1s").stdout
    for word in ("queues", "default", "failures", "ValueError", "running"):
        assert word in told


@pytest.mark.parametrize("name", canned())
def test_m23_a_canned_query_runs(shop, name) -> None:
    shop.failed(1)
    shop.run("sql", name)


def test_sql_reads_and_writes_nothing(shop) -> None:
    shop.failed(2)
    counted = "select state, count(*) as jobs from sqlqueue.jobs group by state"
    assert shop.json("sql", counted) == [{"state": "failed", "jobs": 2}]
    assert shop.run("sql", counted, "--csv").stdout.splitlines() == ["state,jobs", "failed,2"]
    Path("/tmp/sqlqueue-query.sql").write_text("select ':x' as a, 1::int as b")
    try:
        assert shop.json("sql", "-f", "/tmp/sqlqueue-query.sql") == [{"a": ":x", "b": 1}]
    finally:
        Path("/tmp/sqlqueue-query.sql").unlink()
    refused = shop.run("sql", "delete from sqlqueue.job", exits=1)
    assert "read-only" in refused.stderr
    shop.run("sql", exits=2)
    assert len(shop.json("sql", "--list")) == 9


def test_health_says_it_by_its_exit_code(shop) -> None:
    shop.run("health", "live")
    shop.run("health", "ready", exits=1)
    shop.does.using(queue="slow").enqueue()
    rows(shop.engine, "update sqlqueue.ready set due_at = now() - interval '1 h'")
    with shop.queue.worker("default", **POLLING):
        wait_until(lambda: value(shop.engine, "select count(*) from sqlqueue.worker"))
        shop.run("health", "ready")
        shop.run("health", "ready", "--max-wait", "5m", exits=1)


def test_a_worker_leaves_out_queues(shop, tmp_path) -> None:
    (tmp_path / "app_here.py").write_text(
        f"from sqlqueue import Queue\nqueue = Queue({shop.url!r})\n"
        "@queue.task(name='one', queue='a')\ndef one(): pass\n"
        "@queue.task(name='two', queue='b')\ndef two(): pass\n"
    )
    for task, queue in (("one", "a"), ("two", "b")):
        shop.queue.using(queue=queue).send(task)
    words = ["-A", "app_here", "worker", "--exclude", "b", "--drain", "--health-port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "sqlqueue", *words], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(shop.engine, "select queue from sqlqueue.live") == [("b",)]


# Setting up


def test_init_writes_a_first_application(shop, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "would write" in shop.run("init", "--dry-run").stderr
    assert list(tmp_path.iterdir()) == []
    shop.run("init")
    assert 'app = "tasks:queue"' in (tmp_path / "pyproject.toml").read_text()
    shop.run("init", exits=1)
    compile((tmp_path / "tasks.py").read_text(), "tasks.py", "exec")


def test_prune_drops_what_is_past_the_retention(shop) -> None:
    rows(shop.engine, "create table sqlqueue.log_20200106 partition of sqlqueue.log"
         " for values from ('016f78a4-0000-7000-8000-000000000000')"
         " to ('016f9cb0-0000-7000-8000-000000000000')")  # fmt: skip
    assert "would drop log_20200106" in shop.run("prune", "--dry-run").stdout
    shop.run("prune", exits=1)
    shop.run("prune", "--yes", "--older-than", "60d")
    there = "select to_regclass('sqlqueue.log_20200106')"
    assert value(shop.engine, there) is None
    assert value(shop.engine, "select retention from sqlqueue.setting") == timedelta(days=60)
    rows(shop.engine, "update sqlqueue.setting set retention = '30 days'")


def test_a_report_holds_no_secret(shop) -> None:
    shop.does.enqueue(password="hunter2", secret="s3cr3t")
    document = json.loads(shop.run("report").stdout)
    assert {"sqlqueue", "python", "settings", "health", "storage", "totals"} <= set(document)
    text = json.dumps(document)
    assert "hunter2" not in text
    password = shop.engine.url.password
    assert not password or str(password) not in text


def test_a_shell_has_the_queue(tmp_path, shop) -> None:
    (tmp_path / "app_here.py").write_text(
        f"from sqlqueue import Queue\nqueue = Queue({shop.url!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "sqlqueue", "-A", "app_here", "shell"], input="print(queue.tasks)\n",
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert "{}" in done.stdout
    assert done.returncode == 0


def test_completion_is_a_script(shop) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_SQLQUEUE_COMPLETE" in shop.run("completion", shell).stdout
