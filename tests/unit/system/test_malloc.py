"""Pages of libraries are given back, and nothing else is."""

from __future__ import annotations

import sys

import pytest

from sensorium.system.malloc import _unwritten, forget_code

SMAPS = """\
1000-3000 r--p 00000000 08:01 7                                   /usr/lib/libx.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
3000-5000 r-xp 00002000 08:01 7                                   /usr/lib/libx.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
5000-6000 r--p 00004000 08:01 7                                   /usr/lib/libx.so
Rss:                   4 kB
Anonymous:             4 kB
VmFlags: rd mr mw me
6000-7000 rw-p 00005000 08:01 7                                   /usr/lib/libx.so
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd wr mr mw me
8000-a000 r--p 00000000 08:01 9                                   /models/model.safetensors
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
b000-c000 rw-p 00000000 00:00 0                                   [heap]
Rss:                   4 kB
Anonymous:             4 kB
VmFlags: rd wr mr mw me
"""


def test_what_was_relocated_or_is_written_to_stays_and_so_do_weights() -> None:
    assert list(_unwritten(SMAPS)) == [(0x1000, 0x3000), (0x3000, 0x5000)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_libraries_work_afterwards() -> None:
    forget_code()
    assert sorted([3, 1, 2]) == [1, 2, 3]
    import json

    assert json.loads("[1.5]") == [1.5]
