"""Modules that are read at the first use: what reads them, and what does not."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sensorium.system import unread


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`postponed.later` waits to be read, and so does `postponed.broken`, which raises at the first time."""
    folder = tmp_path / "postponed" / "later"
    folder.mkdir(parents=True)
    (tmp_path / "postponed" / "__init__.py").write_text("from postponed import later as later\ndone = []\n")
    (folder / "__init__.py").write_text(
        "import time\nimport postponed\nfrom postponed.later.circle import seen\ntime.sleep(0.05)\n"
        "postponed.done.append(__name__)\nvalue = 7\n"
    )
    (folder / "inner.py").write_text("value = 8\n")
    (folder / "circle.py").write_text("import postponed.later as outer\nseen = hasattr(outer, 'value')\n")
    broken = "import postponed\npostponed.done.append(1)\nif len(postponed.done) < 2:\n    1 / 0\nvalue = 9\n"
    (tmp_path / "postponed" / "broken.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    unread.postpone(["postponed.later", "postponed.broken"])
    yield "postponed"
    sys.meta_path[:] = finders
    for name in [one for one in sys.modules if one.partition(".")[0] == "postponed"]:
        del sys.modules[name]


def test_importing_reads_nothing(package: str) -> None:
    outer = importlib.import_module(package)
    later, inner = importlib.import_module("postponed.later"), importlib.import_module("postponed.later.inner")
    assert inner.value == 8 and later.inner is inner and outer.later is later
    assert later.__spec__ is not None and str(later.__file__).endswith("__init__.py")
    assert not hasattr(later, "__warningregistry__"), "who walks through all modules asks for such"
    assert outer.done == []


def test_the_first_look_reads_it_once(package: str) -> None:
    outer = importlib.import_module(package)
    from postponed.later import value  # type: ignore[import-not-found]

    assert value == 7 and outer.later.value == 7 and outer.done == ["postponed.later"]
    assert outer.later.seen is False, "what it imports finds what there is so far"
    assert type(outer.later) is ModuleType and not hasattr(outer.later, "missing")


def test_threads_that_look_at_once_all_see_it(package: str) -> None:
    outer = importlib.import_module(package)
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(outer.later.value)) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert seen == [7] * 8 and outer.done == ["postponed.later"]


def test_an_error_comes_at_the_look_and_the_next_one_tries_again(package: str) -> None:
    broken = importlib.import_module("postponed.broken")
    with pytest.raises(ZeroDivisionError):
        broken.value  # noqa: B018
    assert broken.value == 9


def test_all_are_read_when_asked_for(package: str) -> None:
    outer = importlib.import_module(package)
    unread.read_all()
    assert outer.done == ["postponed.later"]


def test_others_are_left_alone(package: str) -> None:
    outer = importlib.import_module(package)
    unread.read(outer)
    assert outer.done == []
