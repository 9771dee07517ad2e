"""`uuid` on media parts: what a part may have and lack."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.api.protocol.chat import ChatRequest
from sensorium.api.protocol.common import UnknownFields
from sensorium.api.protocol.validation import parse_json
from sensorium.config import Limits
from sensorium.errors import RequestError
from sensorium.media.source import MediaSource

PLACE = "messages[0].content[0]"
SEES = frozenset({"image", "video", "audio"})


def sources(part: dict[str, Any]) -> tuple[MediaSource, ...]:
    body = {"messages": [{"role": "user", "content": [part]}]}
    request = parse_json(ChatRequest, json.dumps(body).encode(), UnknownFields())
    return request.conversation(SEES, Limits()).media  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("nothing", [{}, {"value": None}, {"value": {}}, {"value": {"url": None}}])
def test_a_name_alone_stands_for_the_item(kind: str, nothing: dict[str, Any]) -> None:
    name = f"{kind}_url"
    part = {"type": name, "uuid": "u", **({name: nothing["value"]} if nothing else {})}
    [source] = sources(part)
    assert (source.kind, source.uuid, source.is_named_only, source.param) == (kind, "u", True, f"{PLACE}.uuid")


def test_names_go_with_content() -> None:
    [source] = sources({"type": "image_url", "image_url": "data:,x", "uuid": "u"})
    assert (source.url, source.uuid, source.is_named_only) == ("data:,x", "u", False)
    [source] = sources({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}, "uuid": "u"})
    assert (source.data, source.format, source.uuid) == ("AA", "wav", "u")
    [source] = sources({"type": "input_audio", "uuid": "u"})
    assert source.is_named_only


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": None, "uuid": None}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
        ({"type": "image_url", "image_url": "data:,x", "uuid": ""}, "uuid"),
        ({"type": "image_url", "uuid": "x" * 129}, "uuid"),
        ({"type": "video_url", "uuid": 5}, "uuid"),
    ],
)
def test_what_is_missing_is_named(part: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        sources(part)
    assert (caught.value.status, caught.value.param) == (400, f"{PLACE}.{param}")
