"""What an engine's process leaves unread of torch, and that it is there for who wants it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sensorium.engine import torch_modules

LOOK = """
import sys
from sensorium.engine.loop import prepare_process
prepare_process()
import sensorium.engine.loading, torch
from sensorium.engine.torch_modules import UNUSED
from sensorium.system.unread import Unread, read
unread = [name for name in UNUSED if type(sys.modules[name]) is Unread]
assert unread == list(UNUSED), unread
assert "torch._decomp" not in sys.modules and "torch._export" not in sys.modules
with torch.device("meta"):
    assert torch.nn.Linear(2, 3)(torch.empty(4, 2)).shape == (4, 3)
assert type(torch._meta_registrations) is Unread
assert torch.distributions.Normal(0.0, 1.0).mean == 0
read(torch._meta_registrations)
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    assert torch.linalg.qr(torch.empty(3, 2))[0].shape == (3, 2)
print(type(torch._meta_registrations) is not Unread)
"""


@pytest.mark.skipif(torch_modules.version() not in torch_modules.TRIED, reason="imported as it is")
def test_what_nobody_uses_is_not_read_and_still_there() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_versions_that_were_not_tried_are_imported_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finders = list(sys.meta_path)
    for text, expected in (("'9.7.1+cpu'", "9.7"), ('"9.7.0a0"', "9.7"), ("none", "")):
        (tmp_path / "version.py").write_text(f"__all__ = []\n__version__ = {text}\n")
        (tmp_path / "__init__.py").write_text("")
        monkeypatch.setattr(torch_modules, "_origin", lambda: tmp_path / "__init__.py")
        assert torch_modules.version() == expected
        torch_modules.postpone_unused()
        assert sys.meta_path == finders
    monkeypatch.setattr(torch_modules, "_origin", lambda: tmp_path / "elsewhere" / "__init__.py")
    assert torch_modules.version() == ""
