"""What users get for their own tests: the sample project of docs/testing.md, run by pytest."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/testing.md"


def test_the_sample_project_passes_its_tests(tmp_path: Path, server_url: str) -> None:
    page = PAGE.read_text()
    (shop,) = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    (tests,) = re.findall(r"^```python test\n(.*?)^```$", page, re.S | re.M)
    (tmp_path / "shop.py").write_text(shop)
    (tmp_path / "test_shop.py").write_text(tests)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"SQLQUEUE_TEST_URL": server_url},
        capture_output=True,
        text=True,
        check=False,
    )

    assert "4 passed" in done.stdout, done.stdout + done.stderr
