"""Triton's kernels against their reference, in Triton's interpreter.

The interpreter must be chosen before Triton is imported and leaves its language changed, so every file of `interpreted`
runs in a process of its own. `TRITON_INTERPRET=1 pytest FILE` runs one by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("cases_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    pytest.importorskip("triton", minversion="3.9", reason="the interpreter of Triton 3.9 or later is not there")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    root = Path(__file__).parents[4]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
