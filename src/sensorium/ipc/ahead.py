"""An engine process that is started before it is known what it is to load: half of a start is its import of torch.

It imports while the command line is parsed and the checkpoint is read, and waits at its socket for its configuration.
Where that never comes it finds the socket closed and ends. This module imports next to nothing itself.
"""

from __future__ import annotations

import socket
import subprocess
import sys

STDERR = 2
Started = tuple[subprocess.Popen[bytes], socket.socket]  # and our end of its socket

_waiting: list[Started] = []  # at most one


def start_engine() -> Started:
    """Returns at once; the child imports meanwhile."""
    ours, theirs = socket.socketpair()
    with theirs:
        # -P: nothing in the current folder takes the place of a module.
        command = [sys.executable, "-P", "-m", "sensorium.engine.loop", "--fd", str(theirs.fileno())]
        # Its own session: Ctrl-C is for this process, which lets running requests finish first.
        # What it prints is never part of this process's output.
        process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=STDERR, start_new_session=True
        )
    return process, ours


def start_ahead() -> None:
    """One that the first `take` gets."""
    if not _waiting:
        _waiting.append(start_engine())


def take() -> Started:
    """The one that was started ahead, if it still runs, or a new one."""
    if _waiting:
        process, ours = _waiting.pop()
        if process.poll() is None:
            return process, ours
        ours.close()
    return start_engine()


def discard() -> None:
    """No engine is started soon after all."""
    if _waiting:
        process, ours = _waiting.pop()
        ours.close()
        process.kill()
        process.wait()
