"""Messages between the processes: what goes in comes out, however the stream is cut; nonsense is refused."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_harness import image_request

from sensorium.config import EngineConfig
from sensorium.ipc import messages
from sensorium.ipc.messages import FrameReader, Kind, ProtocolError, StepOutputs
from sensorium.types import (
    EngineOutput,
    EngineReady,
    EngineRequest,
    EngineStats,
    Grammar,
    MediaFeatures,
    MediaSpan,
    PoolingParams,
    Prompt,
    SamplingParams,
    TokenLogprob,
)


def same(a: Any, b: Any) -> bool:
    """Equality that looks into arrays and records."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def received(frame: bytes | list[messages.Buffer]) -> tuple[int, memoryview]:
    data = frame if isinstance(frame, bytes) else b"".join(frame)
    [(kind, payload)] = FrameReader().feed(data)
    return kind, payload


PLAIN = Prompt(np.array([1, 2, 2**31 - 1], np.int32))
RICH = Prompt(
    np.arange(50, dtype=np.int32),
    (
        MediaFeatures(
            "image",
            b"\0key",
            4,
            {"pixels": np.random.rand(7, 3).astype(np.float32), "grid": np.array([1, 2, 2], np.int64)},
        ),
        MediaFeatures("audio", b"", 1, {"mel": np.zeros((0, 128), np.float16), "u": np.array(7, np.uint8)}),
    ),
    (MediaSpan(0, 3, 4), MediaSpan(1, 9, 1, 0)),
    np.arange(150, dtype=np.int32).reshape(3, 50),
    -9,
    np.zeros(50, np.int32),
)
PARAMS = SamplingParams(
    max_tokens=5,
    min_tokens=1,
    temperature=0.5,
    top_p=0.9,
    top_k=3,
    min_p=0.1,
    presence_penalty=-1.5,
    frequency_penalty=2.0,
    repetition_penalty=1.2,
    seed=-(2**63),
    stop_token_ids=(1, 2),
    logprobs=0,
    prompt_logprobs=20,
    logit_bias=((5, -100.0), (6, 1.5)),
    grammar=Grammar("lark", 'start: "a"'),
)


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(1, PLAIN, SamplingParams(3)),
        EngineRequest(2**63, RICH, PARAMS, None, -5, b"salt\0"),
        EngineRequest(3, RICH, None, PoolingParams("embed", True, 256, False)),
        image_request(1, grid=(40, 40), images=3),
    ],
)
def test_requests_arrive_as_they_were(request_: EngineRequest) -> None:
    kind, payload = received(messages.encode_request(request_))
    assert kind == Kind.REQUEST
    assert same(messages.decode_request(payload), request_)


def test_large_arrays_are_not_copied() -> None:
    request = image_request(1, grid=(60, 60))
    pixels = request.prompt.media[0].arrays["pixels"]
    pieces = messages.encode_request(request)
    assert any(isinstance(p, memoryview) and np.shares_memory(np.frombuffer(p, np.uint8), pixels) for p in pieces)
    payload = memoryview(bytearray(b"".join(pieces)))[messages.HEAD_BYTES :]
    arrived = messages.decode_request(payload).prompt.media[0].arrays["pixels"]
    assert np.shares_memory(arrived, np.frombuffer(payload, np.uint8))
    assert arrived.flags.writeable


def test_arrays_in_any_layout() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    prompt = Prompt(np.arange(20, dtype=np.int32)[::2], (MediaFeatures("image", b"", 1, {"a": array}),))
    request = EngineRequest(1, prompt)
    assert same(messages.decode_request(received(messages.encode_request(request))[1]), request)


@pytest.mark.parametrize("array", [np.zeros(3), np.array(["a"]), np.array([{}], object), np.zeros(3, bool)])
def test_only_plain_numbers_are_sent(array: Any) -> None:
    """Among them no objects: nothing is ever pickled."""
    prompt = Prompt(PLAIN.token_ids, (MediaFeatures("image", b"", 1, {"a": array}),))
    with pytest.raises(ProtocolError):
        messages.encode_request(EngineRequest(1, prompt))


Logprobs = st.builds(
    TokenLogprob,
    st.integers(0, 2**31),
    st.floats(-100, 0),
    st.lists(st.tuples(st.integers(0, 2**31), st.floats(-100, 0)), max_size=3).map(tuple),
)
Outputs = st.builds(
    EngineOutput,
    id=st.integers(0, 2**63),
    token_ids=st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_token_id=st.one_of(st.none(), st.integers(0, 2**31)),
    logprobs=st.lists(Logprobs, max_size=2).map(tuple),
    prompt_logprobs=st.lists(st.one_of(st.none(), Logprobs), max_size=3).map(tuple),
    cached_tokens=st.integers(0, 2**31),
    vector=st.one_of(st.none(), st.sampled_from([(3,), (2, 4), (0,)]).map(lambda s: np.full(s, 1.5, np.float32))),
    error=st.text(max_size=5),
)


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)), max_size=5),
    st.lists(Outputs, max_size=4),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_outputs_arrive_however_the_stream_is_cut(
    plain: list[tuple[int, int]], full: list[EngineOutput], cuts: list[int]
) -> None:
    outputs = StepOutputs()
    for request_id, token in plain:
        outputs.add_token(request_id, token)
    outputs.extend(full)
    assert bool(outputs) == bool(plain or full)
    frame = messages.encode_outputs(outputs)
    stream = messages.frame(Kind.BEAT) + frame + messages.encode_fatal("x" * 50) + frame
    reader, arrived, start = FrameReader(), [], 0
    for number in range(len(stream)):
        end = start + cuts[number % len(cuts)]
        arrived += [(kind, bytes(payload)) for kind, payload in reader.feed(stream[start:end])]
        start = end
    assert [kind for kind, _ in arrived] == [Kind.BEAT, Kind.OUTPUTS, Kind.FATAL, Kind.OUTPUTS]
    for index in (1, 3):
        got = messages.decode_outputs(memoryview(arrived[index][1]))
        assert list(zip(got.ids, got.token_ids, strict=True)) == plain
        assert same(tuple(got.full), tuple(full))
    assert messages.decode_fatal(arrived[2][1]) == "x" * 50


def test_small_messages() -> None:
    config = EngineConfig("folder", max_model_len=7, kv_cache_memory=2**40, enable_prefix_caching=False)
    stats = EngineStats(running=3, step_seconds=0.25)
    ready = EngineReady(1, 2, 3, 4, 5, 0.5, "cpu", "bfloat16", ("generate", "embed"), 64)
    assert messages.decode_config(received(messages.encode_config(config))[1]) == config
    assert messages.decode_stats(received(messages.encode_stats(stats))[1]) == stats
    assert messages.decode_ready(received(messages.encode_ready(ready))[1]) == ready
    assert messages.decode_progress(received(messages.encode_progress("weights", 0.5))[1]) == ("weights", 0.5)
    assert messages.decode_abort(received(messages.encode_abort([1, 2**63]))[1]) == (1, 2**63)


def test_a_frame_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(struct.pack("<IB", 2**32 - 1, Kind.OUTPUTS))
    with pytest.raises(ProtocolError):
        messages.parse_head(struct.pack("<IB", 2**31 + 1, Kind.REQUEST))


@given(st.binary(max_size=60))
def test_noise_raises_nothing_else(noise: bytes) -> None:
    for decode in (messages.decode_request, messages.decode_outputs, messages.decode_stats, messages.decode_abort):
        with contextlib.suppress(ProtocolError):
            decode(memoryview(noise))


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_request_raises_nothing_else(place: int, value: int) -> None:
    payload = bytearray(b"".join(messages.encode_request(EngineRequest(3, RICH, PARAMS)))[messages.HEAD_BYTES :])
    payload[place] = value
    with contextlib.suppress(ProtocolError):
        messages.decode_request(memoryview(payload))
