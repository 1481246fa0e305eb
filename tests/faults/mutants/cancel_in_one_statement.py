"""A cancel asks only a run that it sees; of a job that is being claimed no request is left."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r21"
TESTS = "tests/faults/test_permute.py"
FILE = "migrations/versions/0002_policies.py"
ASKED = """    select id, cancel_job.reason
    from sqlqueue.job
    where id = wanted
      and not exists (select from sqlqueue.run where run.job_id = wanted and is_final)
"""
RUNNING = """    select job_id, cancel_job.reason
    from sqlqueue.lease
    where job_id = wanted
"""


def apply(root: Path) -> None:
    replace(root, FILE, ASKED, RUNNING)
