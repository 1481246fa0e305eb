"""The verdict over a run with faults: Jepsen's total-queue checker, extended to tables.

Every job asked for is told apart by its id. After a full drain, what the enqueuers were told is
compared with what is in the tables: the effects of the tasks, and the application's own rows.
Source: the total-queue checker of Jepsen (jepsen.checker/total-queue).
"""

from dataclasses import dataclass, fields
from uuid import UUID

from sqlalchemy import Engine

from tests.faults.history import History
from tests.harness import rows, value, wait_until


@dataclass(frozen=True)
class Verdict:
    """What is wrong, by kind; all empty if nothing is.

    lost               acknowledged, and neither with an effect nor ended without success
    unexpected         effects of what was never asked for
    from_rolled_back   rolled back, and yet with a job or an effect
    duplicate_effects  with more than one effect of a transactional task
    finals_not_one     jobs whose number of final runs is not one
    half               application's rows without their job, or jobs without their row
    """

    lost: set[UUID]
    unexpected: set[UUID]
    from_rolled_back: set[UUID]
    duplicate_effects: set[UUID]
    finals_not_one: set[UUID]
    half: set[UUID]

    def wrong(self) -> dict[str, set[UUID]]:
        """Return the kinds that are not empty."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: ids for name, ids in found.items() if ids}


def drained(engine: Engine, within: float = 60) -> None:
    """Wait until no job is left that has not ended; a run that does not drain is inconclusive."""
    wait_until(
        lambda: value(engine, "select count(*) from sqlqueue.live") == 0,
        within=within,
        what="inconclusive: jobs are left",
    )


def judge(engine: Engine, history: History) -> Verdict:
    """Compare a history with the tables, once all has drained."""

    def ids(sql: str) -> set[UUID]:
        return {UUID(str(row[0])) for row in rows(engine, sql)}

    effects = ids("select cast(key as uuid) from effect")
    jobs = ids("select id from sqlqueue.job")
    failed = ids("select job_id from sqlqueue.run where is_final and outcome <> 'succeeded'")
    requests = ids("select job_id from request")
    asked = history.acknowledged | history.rolled_back | history.unknown
    return Verdict(
        lost=history.acknowledged - (effects | failed),
        unexpected=effects - asked,
        from_rolled_back=history.rolled_back & (jobs | effects),
        duplicate_effects=ids(
            "select cast(key as uuid) from effect group by key having count(*) > 1"
        ),
        finals_not_one=ids(
            "select job.id from sqlqueue.job left join sqlqueue.run"
            " on run.job_id = job.id and run.is_final group by job.id having count(run.job_id) <> 1"
        ),
        half=requests ^ jobs,
    )


def assert_nothing_wrong(engine: Engine, history: History) -> None:
    """Fail unless every term is zero, and there was something to judge."""
    assert history.acknowledged, "inconclusive: nothing was enqueued"
    assert judge(engine, history).wrong() == {}
