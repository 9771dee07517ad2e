"""A follower's process: `python -m sensorium.engine.follower --fd N`. It has one rank's part of a model and of the KV
cache, and computes the steps that rank 0 sends; it neither schedules nor samples.

It lives as long as its socket, and never longer than rank 0's process.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from sensorium.config import EngineConfig
from sensorium.engine.loop import described, set_torch_environment
from sensorium.errors import StartupError
from sensorium.ipc import messages
from sensorium.ipc import ranks as wire
from sensorium.ipc.channel import Channel
from sensorium.ipc.liveness import Pulse
from sensorium.ipc.messages import Kind, ProtocolError

if TYPE_CHECKING:
    from torch import Tensor

    from sensorium.engine.adapters import Adapters
    from sensorium.engine.loading import LoadedPart
    from sensorium.engine.shared_towers import FollowedTowers
    from sensorium.kernels.context import KVCache
    from sensorium.parallel.ranks import Ranks

PATIENCE = 3  # times as long as rank 0's, which is to say who hangs
PR_SET_PDEATHSIG = 1  # of Linux

logger = logging.getLogger("sensorium.engine")


class Follower:
    """What a rank beside 0 does with a message."""

    def __init__(
        self,
        part: LoadedPart,
        cache: KVCache,
        ranks: Ranks,
        adapters: Adapters,
        towers: FollowedTowers,
        send: Callable[[bytes], object],
    ) -> None:
        self._part = part
        self._model = part.model
        self._cache = cache
        self._ranks = ranks
        self._hidden: Tensor | None = None  # of the last step
        self._adapters, self._send = adapters, send
        self._towers = towers

    def take(self, kind: int, payload: memoryview) -> bool:
        """False when there is nothing more to come."""
        if kind == Kind.STEP:
            self._step(payload)
        elif kind == Kind.LOGITS:
            self._logits(payload)
        elif kind == Kind.ENCODE:
            self._towers.begin(payload)
        elif kind == Kind.ADVANCE:
            self._towers.advance(payload)
        elif kind == Kind.FORGET:
            self._towers.forget(payload)
        elif kind == Kind.LOAD_ADAPTER:
            number, folder = messages.decode_load_adapter(payload)
            error = self._adapters.load(number, folder)
            self._send(messages.encode_adapter(number, error, self._adapters.nbytes(number)))
        elif kind == Kind.UNLOAD_ADAPTER:
            self._adapters.unload(messages.decode_unload_adapter(payload))
        elif kind == Kind.SHUTDOWN:
            return False
        else:
            raise ProtocolError(f"message of kind {kind} from rank 0")
        return True

    def _step(self, payload: memoryview) -> None:
        from sensorium.engine.step_messages import moved, share_media, step_of

        found = step_of(payload)
        if found.adapters:
            found.inputs.context.adapters = self._adapters.of_step(found.adapters)
        step = moved(found.inputs, self._part.device)
        hidden = self._model.embed(step.token_ids, step.token_types)
        if found.num_media_tokens:
            hidden, rows = share_media(self._ranks, hidden, self._model.deepstack, found.num_media_tokens)
            step.context.layer_rows = rows
        step.context.token_ids = step.token_ids
        self._hidden = self._model.forward(hidden, step.positions, self._cache, step.context)

    def _logits(self, payload: memoryview) -> None:
        import torch

        if self._hidden is None:
            raise ProtocolError("logits before the first step")
        rows = wire.decode_logits(payload)
        hidden = self._hidden if rows is None else self._hidden[torch.tensor(rows, device=self._hidden.device)]
        self._model.logits(hidden)


def serve(channel: Channel) -> int:
    """Load a part of what the first messages ask for, and compute until told to stop. Returns the exit code."""
    config, me = _told(channel)
    logging.getLogger().handlers[0].setFormatter(logging.Formatter(f"%(levelname)s rank {me.rank}: %(message)s"))
    channel.start()
    try:
        from sensorium.parallel.ranks import Ranks  # imports torch: rank 0 hears of us before that

        ranks = Ranks(me.rank, me.size)
        pulse = Pulse(lambda: channel.send(_beat(pulse, ranks)), PATIENCE * config.hang_after_s)
        pulse.begin(slow=True)
        pulse.start()
        try:
            _follow(channel, config, ranks, me.store, pulse)
        finally:
            pulse.stop()
    except StartupError as error:
        channel.send(messages.encode_lost(f"could not load its part: {error.message}"))
        return 2
    except Exception as error:
        logger.exception("this rank cannot go on")
        channel.send(messages.encode_lost(f"failed: {described(error)}"))
        return 1
    return 0


def _told(channel: Channel) -> tuple[EngineConfig, wire.RankOf]:
    kinds, payloads = zip(*(channel.receive() for _ in range(2)), strict=True)
    if kinds != (Kind.CONFIG, Kind.RANK):
        raise ProtocolError("the first messages are not the configuration and the rank")
    return messages.decode_config(payloads[0]), wire.decode_rank(payloads[1])


def _beat(pulse: Pulse, ranks: Ranks) -> bytes:
    return wire.encode_beat(works=pulse.is_busy and not ranks.waits)


def _follow(channel: Channel, config: EngineConfig, ranks: Ranks, store: str, pulse: Pulse) -> None:
    from pathlib import Path

    import torch

    from sensorium.engine.adapters import Adapters
    from sensorium.engine.encoding import encode_alone
    from sensorium.engine.loading import cache_of_rank, load_part, room_of_rank
    from sensorium.engine.runner import is_device_lost
    from sensorium.engine.shared_towers import FollowedTowers
    from sensorium.models.loading import weight_bytes

    part = load_part(config, ranks=ranks)
    available = room_of_rank(part, config, ranks)
    gc.collect()
    gc.freeze()
    pulse.end()
    channel.send(wire.encode_loaded(wire.Loaded(weight_bytes(part.model), available)))
    frames = channel.poll(wait=True)
    kind, payload = frames.pop(0)
    if kind != Kind.CACHE:
        raise ProtocolError(f"message of kind {kind} in the place of the cache's size")
    pulse.begin(slow=True)
    cache = cache_of_rank(part, config, wire.decode_cache(payload))
    ranks.connect(Path(store), part.device)
    adapters = Adapters(part.model, part.dtype, part.device)
    encode = functools.partial(encode_alone, part.model, part.device)
    towers = FollowedTowers(encode, is_device_lost, channel.send)
    follower = Follower(part, cache, ranks, adapters, towers, channel.send)
    with torch.inference_mode():
        while True:
            pulse.end()
            for kind, payload in frames or channel.poll(wait=True):
                pulse.begin(slow=kind == Kind.LOAD_ADAPTER)
                if not follower.take(kind, payload):
                    return
            frames = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to rank 0")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also where it is stopped and hears no end of file
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s follower: %(message)s", stream=sys.stderr)
    set_torch_environment()
    return serve(Channel(socket.socket(fileno=arguments.fd)))


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
