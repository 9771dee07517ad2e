"""Triton's kernels against their reference, in Triton's interpreter.

The interpreter must be chosen before Triton is imported and leaves its language changed, so the files of `interpreted`
run in two other processes: beside each other, and without importing torch for each. `TRITON_INTERPRET=1 pytest FILE`
runs one by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("cases_*.py"))
HALVES = {"one": FILES[::2], "other": FILES[1::2]}


@pytest.mark.parametrize("half", HALVES)
def test_interpreted(half: str) -> None:
    pytest.importorskip("triton", minversion="3.9", reason="the interpreter of Triton 3.9 or later is not there")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *map(str, HALVES[half]),
    ]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
