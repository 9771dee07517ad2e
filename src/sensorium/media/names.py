"""Host names -> addresses by the system's resolver, which blocks for as long as a name server likes.

Nothing is kept: an answer from a cache would tell one tenant which hosts another one has named.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from sensorium.media.turns import Turns

LOOKUPS, LOOKUPS_PER_TENANT, LOOKUPS_PER_DOMAIN = 64, 16, 4  # at a time; a domain's are those of one tenant


class DaemonThreads(Executor):
    """A thread for every call, which does not hold up the end of the process. Callers bound their number."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*arguments, **options))
                except OSError as error:
                    future.set_exception(error)
                except ValueError as error:  # a name that cannot be encoded
                    future.set_exception(error)

        threading.Thread(target=run, name="media-dns", daemon=True).start()
        return future


class SystemResolver:
    """Lookups side by side, bounded for each tenant, and within a tenant for each domain: names whose server is slow
    delay names of that domain, then that tenant's, and nobody else's. A lookup whose caller has gone still counts until
    the system gives it up."""

    def __init__(self) -> None:
        self._domains = Turns(1 << 30, LOOKUPS_PER_DOMAIN)
        self._tenants = Turns(LOOKUPS, LOOKUPS_PER_TENANT)
        self._threads = DaemonThreads()

    async def addresses(self, host: str, port: int, tenant: bytes) -> list[str]:
        """OSError or UnicodeError where the system knows none."""
        domain = tenant + b"\0" + ".".join(host.rsplit(".", 2)[-2:]).encode()
        async with self._domains.taken(domain):
            answers = await self._tenants.run(
                self._threads, tenant, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
        return list(dict.fromkeys(str(answer[4][0]) for answer in answers))
