"""Threads for prompts: who has them, and what is in memory at a time."""

from __future__ import annotations

import asyncio
import threading

from sensorium.serving.concurrency import LARGE_TEXT, PromptThreads


async def test_large_texts_are_tokenized_one_at_a_time() -> None:
    """Whoever sends them, while short ones go on beside them."""
    threads, running, most, release = PromptThreads(6), 0, 0, threading.Event()
    lock = threading.Lock()

    def large() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(30)
        with lock:
            running -= 1

    jobs = [asyncio.ensure_future(threads.run(False, large, bytes([n % 3]), characters=LARGE_TEXT)) for n in range(6)]
    await asyncio.sleep(0.05)
    assert await threads.run(False, lambda: 7, b"\0", characters=LARGE_TEXT - 1) == 7
    assert await threads.run(True, lambda: 8, b"\0", characters=LARGE_TEXT) == 8
    assert not any(job.done() for job in jobs)
    release.set()
    await asyncio.gather(*jobs)
    assert most == 1
    threads.close()
