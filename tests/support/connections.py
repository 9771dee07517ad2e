"""Raw connections: floods, slow and silent clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from support.api_support import Reply, read_reply, speak

slowly = partial(speak, delay_s=0.02)


async def flood(port: int, head: bytes, pieces: Iterable[bytes]) -> tuple[Reply | None, int]:
    """Send for as long as the server takes it; the answer, if one came, and the bytes that were taken."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(read_reply(reader))
    sent = 0
    try:
        writer.write(head)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
            await asyncio.sleep(0)  # drain alone lets nobody read the answer while there is room in the socket
            if answer.done():
                break
    except ConnectionError:
        pass
    try:
        return await asyncio.wait_for(answer, 120), sent
    except (ConnectionError, asyncio.IncompleteReadError):
        return None, sent
    finally:
        writer.close()
