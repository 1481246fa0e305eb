"""Arguments and results that the database cannot read."""

from typing import Any

import pytest
from cryptography.fernet import Fernet

from sqlqueue import Queue, Retry, Unique
from sqlqueue.integrations.encryption import Encryption
from tests.harness import rows, value, work

OLD, NEW = Fernet.generate_key(), Fernet.generate_key()


def echo(queue: Queue, **options: Any) -> Any:
    @queue.task(name="echo", retry=Retry(attempts=1), **options)
    def echo(secret: str) -> str:
        return secret * 2

    return echo


def test_the_database_sees_neither_arguments_nor_results(queue, engine) -> None:
    queue.cipher = Encryption([NEW])
    job = echo(queue).enqueue("xyzzy")
    queue.send("echo", "plugh")
    work(queue)

    assert job.refresh().result == "xyzzyxyzzy"
    stored = rows(engine, "select args::text, result::text from sqlqueue.jobs")
    assert len(stored) == 2
    for args, result in stored:
        assert not {"xyzzy", "plugh"} & {args, result}
        assert args.startswith('{"$sealed"')
        assert result.startswith('{"$sealed"')


def test_a_new_key_opens_what_the_old_one_sealed(queue) -> None:
    queue.cipher = Encryption([OLD])
    job = echo(queue).enqueue("a")
    queue.cipher = Encryption([NEW, OLD])
    work(queue)

    queue.cipher = Encryption([NEW])
    assert job.refresh().result == "aa"


def test_what_was_stored_before_opens_as_it_is(queue) -> None:
    job = echo(queue).enqueue("a")
    queue.cipher = Encryption([NEW])
    work(queue)

    assert job.refresh().result == "aa"


def test_without_its_key_a_job_fails_and_says_so(queue) -> None:
    queue.cipher = Encryption([OLD])
    job = echo(queue).enqueue("a")
    queue.cipher = Encryption([NEW])
    work(queue)

    assert job.refresh().error_type == "cryptography.fernet.InvalidToken"


def test_unique_jobs_are_told_by_what_is_sealed(queue, engine) -> None:
    queue.cipher = Encryption([NEW])
    task = echo(queue, unique=Unique())

    assert task.enqueue("a").id == task.enqueue("a").id != task.enqueue("b").id
    assert value(engine, "select count(*) from sqlqueue.live") == 2


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="Fernet key"):
        Encryption(["secret"])
