"""Run the tests, and those that fail once more, alone: `python tools/run_tests.py [arguments of pytest]`.

Tests run beside each other, on machines that others use too. One that fails there and passes alone is named at the end
and refuses nothing; it is a fault all the same, of the test or of the program. One that fails twice refuses the change,
and so do more than `MOST` that fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 3
FAILED = 1  # pytest's exit status where tests ran and some failed


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *arguments]
        status = subprocess.run(command, check=False).returncode
        failed = failures(Path(cache))
        if status != FAILED or not 0 < len(failed) <= MOST:
            return status
        print(f"\nOnce more, alone: {len(failed)} that failed.", flush=True)
        status = subprocess.run([*command, "--last-failed", "-n", "0"], check=False).returncode
        if status == 0:
            print("Failed beside the others and passed alone (mend them):", *failed, sep="\n  ")
        return status


def failures(cache: Path) -> list[str]:
    """Names of the tests that failed, as pytest keeps them."""
    file = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(file.read_text())) if file.exists() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
