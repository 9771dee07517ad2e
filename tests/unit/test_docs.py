"""Documentation that can rot: generated tables are current, links lead somewhere, no path of anybody's machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
# Joined here so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile("|".join(f"/{name}/" for name in ("home", "root", "work/main", "work/shared", "tmp/ckpt")))


def committed_files() -> list[Path]:
    """Files that git tracks; none where the tests run outside a clone."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_generated_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "tools/generate_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_no_path_of_a_machine_is_committed() -> None:
    allowed = {"tests/unit/test_docs.py"}
    found = []
    for file in committed_files():
        if not file.exists() or file.relative_to(ROOT).as_posix() in allowed:
            continue
        text = file.read_bytes().decode("utf-8", "ignore")
        found += [f"{file.relative_to(ROOT)}: {match}" for match in MACHINE_PATHS.findall(text)]
    assert not found


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Gemma-3-1B", 999_885_952),
        ("Qwen2-VL-2B", 2_208_985_600),
        ("clip-vit-base-patch32", 151_277_312),
        ("whisper-small", 241_734_912),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    (row,) = re.findall(rf"^\| {re.escape(name)} \| ([\d,]+) M \|", (ROOT / "docs" / "models.md").read_text(), re.M)
    assert int(row.replace(",", "")) == round(parameters / 1e6)


def test_every_flag_is_documented() -> None:
    text = (ROOT / "docs" / "flags.md").read_text()
    assert "| `--max-model-len` |" in text
    assert "`--enable-prefix-caching` / `--no-enable-prefix-caching`" in text


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(\w+)`", (ROOT / "docs" / "safety.md").read_text())
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
