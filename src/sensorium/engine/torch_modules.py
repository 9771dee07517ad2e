"""Modules of torch that an engine imports but does not use: they are read when something looks into them.

What tells shapes of tensors without numbers, what exports and the distributions are 250 modules, 0.2 s and
25 MB. Modules of torch need each other in circles, which its own order of importing takes well: postponed are only
those that it imports behind all others, and leaves, in versions in which that was tried.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from sensorium.system import unread

UNUSED = (
    "torch.export",
    "torch._meta_registrations",
    "torch.distributed._meta_registrations",
    "torch.distributions",
    "torch.masked",
)
TRIED = ("2.13",)


def postpone_unused() -> None:
    """Before torch is imported. Nothing happens with versions that are not known."""
    if version() in TRIED:
        unread.postpone(UNUSED)


def version() -> str:
    """Of the torch that would be imported, "2.13"; empty if that cannot be told."""
    origin = _origin()
    try:
        text = "" if origin is None else origin.with_name("version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"""^__version__ = ['"](\d+\.\d+)\.""", text, re.MULTILINE)
    return found[1] if found else ""


def _origin() -> Path | None:
    spec = find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin)
