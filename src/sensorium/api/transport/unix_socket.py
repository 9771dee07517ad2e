"""A listening Unix socket: what an earlier server left at its path is replaced, and it is removed at the end.

Who may connect is said by write permission on the file: its owner, and whom the umask lets write besides.
"""

from __future__ import annotations

import contextlib
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from sensorium.errors import StartupError


def listen(path: str, backlog: int) -> socket.socket:
    """Raises StartupError if the path cannot be used or another server listens there."""
    file = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(file)
        listener.bind(path)
        may_write = stat.S_IMODE(file.stat().st_mode) & 0o222
        file.chmod(may_write | may_write << 1)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise StartupError(f"Cannot listen on the Unix socket {path}: {error.strerror or error}.") from None
    except StartupError:
        listener.close()
        raise
    return listener


def _clear(file: Path) -> None:
    """Remove a socket at which nobody listens. Nothing else is ever removed."""
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartupError(f"Cannot listen on the Unix socket {file}: there is a file of this name.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(file))
        except (ConnectionRefusedError, FileNotFoundError):
            file.unlink(missing_ok=True)
            return
        except OSError:
            pass
    raise StartupError(f"Cannot listen on the Unix socket {file}: another server does.")


def remover(listener: socket.socket) -> Callable[[], None]:
    """What removes a listener's file at the end, unless another server has put its own there."""
    path = listener.getsockname() if listener.family == socket.AF_UNIX else ""
    if not path:
        return lambda: None
    file = Path(path)
    own = file.stat()

    def remove() -> None:
        with contextlib.suppress(OSError):
            found = file.lstat()
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
                file.unlink()

    return remove
