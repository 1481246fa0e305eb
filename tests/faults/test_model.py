"""Verbs of the store, as Hypothesis draws them, and a model that says what they must do."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.model import Jobs

EFFECTS = {
    "admitted", "cancelled", "claimed", "finished", "promoted", "refused", "replaced", "rescued",
    "retried", "skipped",
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "examples",
    [pytest.param(120, id="short"), pytest.param(1200, id="long", marks=pytest.mark.nightly)],
)
def test_every_ended_job_has_one_final_run(engine, examples) -> None:
    Jobs.did.clear()
    with engine.connect() as conn:
        run_state_machine_as_test(
            lambda: Jobs(conn),
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )

    print(f"{examples} examples: {dict(Jobs.did)}")
    assert set(Jobs.did) == EFFECTS, "inconclusive"
