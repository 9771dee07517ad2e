"""`tools/run_tests.py`: a test that fails once is named, one that fails twice refuses, and so do many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "run_tests.py"
ONCE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_it(number):
    file = Path(__file__).with_name(f"ran{{number}}")
    ran_before = file.exists()
    file.touch()
    assert ran_before

def test_other():
    assert {other}
"""


@pytest.mark.parametrize(
    ("count", "other", "status", "runs"),
    [(1, True, 0, 2), (1, False, 1, 2), (4, True, 1, 1), (0, True, 0, 1)],
    ids=["fails once", "fails twice", "too many", "none fails"],
)
def test_what_fails_runs_once_more_alone(tmp_path: Path, count: int, other: bool, status: int, runs: int) -> None:
    (tmp_path / "test_some.py").write_text(ONCE.format(count=count, other=other))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    ended = subprocess.run(
        [sys.executable, TOOL, "-q", "-n", "1", tmp_path], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    assert ended.stdout.count(" in ") == runs
    assert ("test_some.py::test_it[0]" in ended.stdout.partition("passed alone")[2]) == (count == 1 and other)
