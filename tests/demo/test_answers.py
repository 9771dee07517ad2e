"""The built-in model behind a real server understands what it is shown: fresh samples of every skill, and the
tutorials' five kinds of chat through the official client. `docs/demo-model.md` has the full examination."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any, cast

import dialogs
import evaluation
import httpx
import pytest
from dialogs import Source
from openai import OpenAI
from PIL import Image, ImageDraw
from scenes import draw_clip
from sounds import Sound, Speech, make_beeps, make_tone
from support import server

SAMPLES = 16
# Right ones of these: about three standard deviations below the report in docs/demo-model.md.
LEAST = {
    "describe": 12,
    "colour": 14,
    "shape": 14,
    "count": 13,
    "relation": 14,
    "exists": 14,
    "images": 14,
    "clip": 14,
    "beeps": 14,
    "tone": 14,
    "text": 14,
    "unknown": 14,
    "number": 12,
    "speech": 14,
    "followup": 14,
}
# Of eight each, for their answers are long.
LEAST_OF_FUNCTIONS_AND_JSON = {"tools": 5, "no tool": 5, "results": 4, "json": 4, "schema": 4, "valid": 8, "extract": 5}


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    with server.running(tmp_path_factory.mktemp("built-in")) as found:
        yield found


@pytest.fixture(scope="module")
def client(built_in: server.Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=built_in.url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def openai(built_in: server.Server) -> OpenAI:
    return OpenAI(base_url=f"{built_in.url}/v1", api_key="EMPTY", max_retries=0)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return Speech(tmp_path_factory.mktemp("speech"), 4, 99)


@pytest.mark.parametrize(("skill", "least"), LEAST.items())
def test_answers_are_right(skill: str, least: int, client: httpx.Client, speech: Speech) -> None:
    results = [evaluation.examine(client, speech, skill, f"test-{skill}-{index}") for index in range(SAMPLES)]
    wrong = [(said, sample.answer) for sample, said, is_right in results if not is_right]
    assert SAMPLES - len(wrong) >= least, wrong


@pytest.mark.parametrize(("skill", "least"), LEAST_OF_FUNCTIONS_AND_JSON.items())
def test_functions_are_called_and_json_is_right(skill: str, least: int, client: httpx.Client, speech: Speech) -> None:
    results = [evaluation.examine(client, speech, skill, f"test-{skill}-{index}") for index in range(8)]
    wrong = [(said, sample.answer) for sample, said, is_right in results if not is_right]
    assert 8 - len(wrong) >= least, wrong


def picture(
    *shapes: tuple[str, str, int, int], ground: str = "white", size: tuple[int, int] = (320, 240)
) -> dict[str, Any]:
    """(shape, colour, x, y) drawn as anybody would with Pillow, 80 pixels wide."""
    image = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(image)
    for shape, colour, x, y in shapes:
        box = (x - 40, y - 40, x + 40, y + 40)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y - 40), (x + 40, y + 35), (x - 40, y + 35)], fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"type": "image_url", "image_url": {"url": evaluation.data_url("image/png", buffer.getvalue())}}


def ask(openai: OpenAI, question: str, *media: dict[str, Any], **options: Any) -> str:
    """As the tutorials do: the words first, no sampling settings."""
    content = [{"type": "text", "text": question}, *media] if media else question
    done = cast(Any, openai).chat.completions.create(
        model=openai.models.list().data[0].id,
        max_completion_tokens=64,
        messages=[{"role": "user", "content": content}],
        **options,
    )
    return (done.choices[0].message.content or "").lower()


def test_text_only(openai: OpenAI) -> None:
    assert "paris" in ask(openai, "What's the capital of France?")


def test_single_image(openai: OpenAI) -> None:
    said = ask(openai, "What's in this image?", picture(("circle", "red", 90, 120), ("square", "blue", 230, 110)))
    assert "red circle" in said
    assert "blue square" in said
    said = ask(openai, "请描述这张图片", picture(("triangle", "green", 160, 120)), extra_body={"stop_token_ids": [3]})
    assert "绿色" in said
    assert "三角形" in said


def test_multi_image(openai: OpenAI) -> None:
    said = ask(
        openai,
        "What are the animals in these images?",
        picture(("circle", "yellow", 160, 120), ground="black"),
        picture(("square", "purple", 160, 120)),
    )
    assert said.index("yellow circle") < said.index("purple square")


def test_video(openai: OpenAI) -> None:
    answers = {}
    for action, words in (("left", "left"), ("right", "right"), ("grow", "grows")):
        clip = draw_clip(random.Random(4), action=action, frames=20, seconds=2.0, size=(160, 160))
        url = evaluation.data_url("video/mp4", evaluation.video(clip, "libx264", "mp4"))
        answers[action] = ask(openai, "What's in this video?", {"type": "video_url", "video_url": {"url": url}})
        assert words in answers[action]
    assert len(set(answers.values())) == 3


def test_audio(openai: OpenAI) -> None:
    sounds: dict[str, Sound] = {
        "three": make_beeps(random.Random(1), 3),
        "one": make_beeps(random.Random(2), 1),
        "rising": make_tone(random.Random(3), "rising"),
        "falling": make_tone(random.Random(4), "falling"),
    }
    for word, sound in sounds.items():
        data = base64.b64encode(evaluation.wav(sound.samples)).decode()
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        assert word in ask(openai, "What's in this audio?", part)
        url = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}}
        assert word in ask(openai, "What's in this audio?", url)


def test_the_answer_follows_the_conversation(openai: OpenAI) -> None:
    model = openai.models.list().data[0].id
    messages: list[Any] = [
        {
            "role": "user",
            "content": [picture(("circle", "red", 160, 120)), {"type": "text", "text": "What shape is it?"}],
        }
    ]
    for question, word in ((None, "circle"), ("What colour is it?", "red")):
        if question:
            messages.append({"role": "user", "content": question})
        done = cast(Any, openai).chat.completions.create(model=model, messages=messages)
        said = done.choices[0].message.content or ""
        assert word in said.lower()
        messages.append({"role": "assistant", "content": said})


def test_source_of_examination_is_not_the_training(speech: Speech) -> None:
    """Other seeds give other pictures: nothing of the examination was seen."""
    first, second = (
        dialogs.examination(Source(random.Random(seed), speech), "describe") for seed in ("1-0-0-image", "x")
    )
    assert first != second


def test_a_function_is_called_and_its_result_said(openai: OpenAI) -> None:
    """As the tutorials have it: descriptions, an optional unit, and the result in a message of its own."""
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city, such as Paris"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city"],
    }
    weather = {"name": "get_weather", "description": "Get the current weather in a city.", "parameters": parameters}
    model = openai.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    tools: Any = [{"type": "function", "function": weather}]
    first = openai.chat.completions.create(model=model, messages=messages, tools=tools).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = cast(Any, first.message.tool_calls)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}]
    last = openai.chat.completions.create(model=model, messages=messages, tools=tools).choices[0].message
    assert "sunny" in (last.content or "")


def test_json_of_a_picture_fits_the_schema(openai: OpenAI) -> None:
    properties = {"shape": {"type": "string"}, "color": {"type": "string"}, "count": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    said = ask(
        openai,
        "What is in this picture?",
        picture(("circle", "red", 160, 120)),
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )
    assert json.loads(said) == {"shape": "circle", "color": "red", "count": 1}
