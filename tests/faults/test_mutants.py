"""Bar R40: each mutant breaks its bar, or else the bar proves nothing."""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import mutants

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
COPIED = ("sqlqueue", "migrations", "tests", "docs", "alembic.ini", "pyproject.toml", "README.md")
NAMES = sorted(module.name for module in pkgutil.iter_modules(mutants.__path__))


def load(name: str) -> Any:
    """Import the module of a mutant."""
    return importlib.import_module(f"tests.faults.mutants.{name}")


def copy_checkout(to: Path) -> None:
    """Copy what the tests need of this checkout."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def test_every_mutant_fits_the_code(tmp_path) -> None:
    for name in NAMES:
        for folder in ("sqlqueue", "migrations"):
            shutil.copytree(ROOT / folder, tmp_path / name / folder)
        load(name).apply(tmp_path / name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if hasattr(load(name), "IS_QUICK") else pytest.mark.nightly)
        for name in NAMES
    ],
)
def test_r40_a_mutant_breaks_its_bar(name, server_url, create_database, tmp_path) -> None:
    mutant = load(name)
    copy_checkout(tmp_path)
    mutant.apply(tmp_path)

    tests = getattr(mutant, "TESTS", "tests")
    tier = getattr(mutant, "TIER", "not nightly")
    words = ["-q", "-x", "-m", tier, "-k", mutant.BAR, "-p", "no:cacheprovider", tests]
    own = {"PYTHONPATH": str(tmp_path), "SQLQUEUE_TEST_URL": server_url, "SQLQUEUE_BARS": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )

    # A test has to fail. An error while it is collected or set up is none of its verdicts.
    summary = ran.stdout.splitlines()[-1]
    print(f"{name}: {re.sub(' in .*', '', summary)}")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert re.search(r"\b[1-9]\d* failed", summary), ran.stdout[-3000:]
