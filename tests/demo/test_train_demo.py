"""The tool that trains the built-in model: its network is the served one, its data are what they say, a run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import batches
import dialogs
import evaluation
import folder
import functions
import looks
import numpy as np
import pytest
import records
import torch
from batches import IGNORED, Reader, make_batches
from dialogs import Turn
from httpx import Client
from net import Thinker
from scenes import draw_picture
from sounds import Speech, make_beeps
from support import server
from support.model_driver import Driver, Sequence
from tokenizers import Tokenizer
from training import Trained, load_weights, save_weights
from words import COLOURS, SHAPES, Thing

import sensorium
from sensorium.checkpoint.configs import open_checkpoint
from sensorium.models.loading import load_model
from sensorium.prompt.messages import Message, TextPart

ROOT = Path(__file__).parents[2]
DEMO = Path(sensorium.__file__).parent / "demo"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return Speech(tmp_path_factory.mktemp("speech"), 1, 0)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory, speech: Speech) -> Path:
    """The tool's files with random weights, norms and biases too."""
    made = tmp_path_factory.mktemp("random")
    old = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    folder.write(made, folder.make_tokenizer(list(folder.sentences(speech, 1500)), old))
    torch.manual_seed(0)
    thinker = Thinker(json.loads((made / "config.json").read_text()))
    for p in thinker.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    save_weights(thinker, made)
    return made


@pytest.mark.parametrize("kind", ["image", "video", "audio", "text", "tools"])
def test_network_equals_the_served_model(kind: str, random_folder: Path, speech: Speech) -> None:
    reader = Reader(random_folder)
    served = load_model(open_checkpoint(random_folder), dtype=torch.float32, device="cpu")
    trained = Trained(json.loads((random_folder / "config.json").read_text()))
    load_weights(trained.thinker, random_folder)
    rng = random.Random(3)
    talks = [dialogs.make(dialogs.Source(rng, speech), kind) for _ in range(3)]
    batch = reader.batch(kind, talks, random.Random(5))
    with torch.inference_mode():
        rows = trained.rows(batch) if batch.groups else None
        x = trained.embedded(batch, rows)
        logits = trained.thinker.logits(trained.thinker.model(x, torch.from_numpy(batch.positions))[0])
    media = [reader.features(medium) for dialog in talks for turn in dialog for medium in turn.media]
    if rows is not None:
        items = [{name: torch.from_numpy(np.asarray(array)) for name, array in one.arrays.items()} for one in media]
        with torch.inference_mode():
            theirs = torch.cat(served.encode(kind, items))  # type: ignore[arg-type]
        torch.testing.assert_close(rows, theirs, rtol=1e-4, atol=1e-4)
    for index in range(len(talks)):
        sequence = Sequence(
            batch.token_ids[index].tolist(), rows=x[index], positions=torch.from_numpy(batch.positions[:, index])
        )
        theirs = Driver(served, num_blocks=512).prefill(sequence)
        wanted = batch.targets[index] != IGNORED
        torch.testing.assert_close(logits[index][wanted], theirs[wanted], rtol=1e-4, atol=2e-4)


def _shown(batch: batches.Batch) -> dict[int, Thing]:
    """What the tokens of a batch's first dialog show."""
    return {
        int(place): Thing(list(COLOURS)[colour - 1], list(SHAPES)[shape - 1])
        for place, shape, colour in zip(batch.places, batch.labels["shape"], batch.labels["colour"], strict=True)
        if shape > 0
    }


def _before(reader: Reader, batch: batches.Batch, look: looks.Look) -> str:
    ids = batch.token_ids[0, : look.token + 1].tolist()
    return str(reader.processor.tokenizer.raw.decode(ids, skip_special_tokens=False))


def test_looks_lead_to_the_rows_of_the_thing() -> None:
    """A word of a question looks at the things that it may mean, a word of an answer at the one that it names."""
    reader, rng, checked = Reader(DEMO), random.Random(11), 0
    for things in ([Thing("red", "star"), Thing("blue", "circle")], [Thing("red", "star"), Thing("red", "cross")]):
        picture = draw_picture(rng, things=things)
        dialog = [
            Turn("colour", "What colour is the star?", "Red.", (picture,)),
            Turn("describe", "请描述这张图片", "图片里有一个红色的五角星和一个红色的十字。"),
        ]
        batch = reader.batch("image", [dialog], rng)
        shown = _shown(batch)
        for _, look in batch.looks:
            found = {shown[token] for rows in look.rows for token in rows.tolist()}
            if look.layer == looks.NAMED:
                assert _before(reader, batch, look).endswith("star")
                assert found == {Thing("red", "star")}
            else:
                assert found in ({Thing("red", "star")}, {Thing("red", "cross")} & set(things))
            checked += 1
    assert checked >= 8


def test_things_alike_are_looked_at_each_and_counted() -> None:
    reader, rng = Reader(DEMO), random.Random(5)
    picture = draw_picture(rng, things=[Thing("red", "star"), Thing("blue", "circle"), Thing("red", "star")])
    dialog = [
        Turn("describe", "Describe the image.", "Two red stars and a blue circle.", (picture,)),
        Turn("count", "How many stars are there?", "Two."),
    ]
    batch = reader.batch("image", [dialog], rng)
    shown, told = _shown(batch), []
    for _, look in batch.looks:
        if "count" in look.told:
            told.append((_before(reader, batch, look).split("\n")[-1], look.told["count"]))
            assert len(look.rows) == look.told["count"]
            assert len({shown[token] for rows in look.rows for token in rows.tolist()}) == 1
    assert told == [("", 2), ("Two red stars and", 1), ("", 2)]


def test_a_picture_brought_along_is_meant_alone_and_rows_know_their_picture() -> None:
    reader, rng = Reader(DEMO), random.Random(7)
    first, second = (draw_picture(rng, things=[Thing(colour, "star")]) for colour in ("red", "blue"))
    dialog = [
        Turn("count", "How many stars are there?", "One.", (first,)),
        Turn("count", "How many stars are there?", "One.", (second,)),
        Turn("followup", "Which picture shows a red star?", "The first one."),
    ]
    batch = reader.batch("image", [dialog], rng)
    shown = _shown(batch)
    counted = [look for _, look in batch.looks if "count" in look.told]
    assert [{shown[token].colour for rows in look.rows for token in rows.tolist()} for look in counted] == [
        {"red"},
        {"blue"},
    ]
    numbered = {look.token: look.told["nth"] for _, look in batch.looks if look.layer == looks.NUMBERED}
    assert {(shown[token].colour, number) for token, number in numbered.items()} == {("red", 1), ("blue", 2)}
    (answer,) = (look for _, look in batch.looks if look.layer == looks.NEXT and "nth" in look.told)
    assert answer.told["nth"] == 1


def test_beeps_know_which_they_are(speech: Speech) -> None:
    reader, rng = Reader(DEMO), random.Random(9)
    sound = make_beeps(rng, 4)
    batch = reader.batch("audio", [[Turn("beeps", "How many beeps?", "Four.", (sound,))]], rng)
    numbered = [(look.token, look.told["beep"]) for _, look in batch.looks if look.layer == looks.NUMBERED]
    assert [number for _, number in sorted(numbered)] == [1, 2, 3, 4]
    (answer,) = (look for _, look in batch.looks if look.layer == looks.NEXT)
    assert answer.told == {"beep": 4}
    assert answer.rows[0].tolist() == [max(token for token, _ in numbered)]
    assert make_batches(reader, speech, "audio", 4, "beeps")  # of other sounds there are no looks, or none wrong


def test_what_is_copied_stands_where_it_is_looked_for(random_folder: Path, speech: Speech) -> None:
    """In a call the function's name, the parameters' names and the values: all of the rendered prompt."""
    reader, rng = Reader(random_folder), random.Random(3)
    raw, copied = reader.processor.tokenizer.raw, 0
    for held in (False, True):
        source = dialogs.Source(rng, speech, held=held)
        for _ in range(60):
            dialog = dialogs.examination(source, rng.choice(("tools", "results", "extract")))
            batch = reader.batch("tools", [dialog], rng)
            ids = batch.token_ids[0].tolist()
            copies = [look for _, look in batch.looks if look.layer == looks.COPIED]
            places = {look.token: int(look.rows[0][0]) for look in copies}
            for turn in dialog:
                source_text = turn.question + turn.shown
                for copy in turn.copies:
                    if copy.back == 0:
                        piece = turn.answer[copy.start : copy.end]
                        assert source_text[copy.source : copy.source + len(piece)] == piece
            for token, place in places.items():
                assert place < token  # something that was read before
                one, other = (raw.decode([ids[at]], skip_special_tokens=False) for at in (token + 1, place))
                copied += one.strip() == other.strip()
            assert len(places) == len(copies)
    assert copied > 600


@pytest.mark.parametrize(
    ("called", "question", "word"),
    [("readQwerz", "Please open the qwerz", "qwerz"), ("find_report", "Any reports?", "report"), ("", "Hi", "")],
)
def test_functions_are_looked_up_by_words_of_the_question(
    called: str, question: str, word: str, random_folder: Path
) -> None:
    """From a word to the same one asked, from the sign behind a line's words to those, from the answer to the sign."""
    reader = Reader(random_folder)
    shown = [functions.Function("readQwerz", "", {}, ()), functions.Function("find_report", "Finds the report", {}, ())]
    turn = Turn("tools", question, "Hello!", tools=tuple(one.tool for one in shown))
    if called:
        call = {"id": "", "type": "function", "function": {"name": called, "arguments": "{}"}}
        answer = f'<tool_call>\n{{"name": "{called}", "arguments": {{}}}}\n</tool_call>'
        turn = dataclasses.replace(turn, answer=answer, calls=(call,))
    batch = reader.batch("tools", [[turn]], random.Random(2))

    def line(token: int) -> str:
        return _before(reader, batch, looks.Look(0, token)).split("\n")[-1]

    def ends(layer: int) -> list[tuple[str, list[str], dict[str, int]]]:
        there = [look for _, look in batch.looks if look.layer == layer]
        return [(line(look.token), [line(int(row[0])) for row in look.rows], dict(look.told)) for look in there]

    same = [one for one in ends(looks.MATCHED) if one[2].get("shared") == 2]
    assert len(same) == (0 if not called else 1 if called == "readQwerz" else 2)
    assert all(one.lower().endswith(word) and word in there for one, (there,), _ in same)
    assert {one: told["fits"] for one, _, told in ends(looks.GATHERED)} == {
        one.head: 1 + (one.name == called) for one in shown
    }
    answered = next(one for one in ends(looks.SPREAD) if one[0] == "")  # the token before the answer
    assert answered[1] == [next((one.head for one in shown if one.name == called), "<tools>")]


def test_the_template_shows_functions_behind_the_last_question(random_folder: Path) -> None:
    """Any schema that a client may send; results and calls of the history as the model writes them."""
    reader = Reader(random_folder)
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "A."},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "more": {"type": ["string", "null"]},
        },
        "required": ["city"],
    }
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "Weather. More.", "parameters": parameters},
        },
        {"type": "function", "function": {"name": "now"}},
    ]
    call = {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
    messages = [
        Message("user", (TextPart("Hello"),)),
        Message("assistant", (TextPart("Hello!"),)),
        Message("user", (TextPart("Weather in Zürich?"),)),
        Message("assistant", (), extra={"tool_calls": [call]}),
        Message("tool", (TextPart("sunny"),), extra={"tool_call_id": "call_0"}),
    ]
    assert reader.template.render(messages, tools=tools) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWeather in Zürich?\n<tools>\n"
        "get_weather Weather=get_weather(city:string,unit?:celsius|fahrenheit,days?:integer,more?:string)\n"
        "now=now()\n</tools><|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


def test_functions_of_the_examination_are_not_trained() -> None:
    for one, other in ((functions.FAMILIES, functions.HELD_FAMILIES),):
        assert not {name for family in one for name in family.names} & {
            name for family in other for name in family.names
        }
        assert not {ask for family in one for ask in family.asks} & {ask for family in one for ask in family.held}
    assert not set(functions.CITIES) & set(functions.HELD_CITIES)
    assert not set(functions.PEOPLE) & set(functions.HELD_PEOPLE)
    assert not set(functions.COMMON) & set(functions.HELD_COMMON)
    assert not set(functions.THINGS) & set(functions.HELD_THINGS)


def test_parameters_of_a_function_have_names_of_their_own() -> None:
    """Also where one's other name is what the next is called."""
    slots = (functions.Slot("id", "code", ("code",)), functions.Slot("code", "word", ()))
    family = functions.Family(("find",), ("",), slots, ("Find {id} with code {code}.",))
    for seed in range(20):
        found = functions._function(random.Random(seed), family, family.asks[0])
        assert sorted(slot.key for slot in found.slots.values()) == ["code", "id"]


def test_unknown_words_are_spelt_alike_everywhere(random_folder: Path) -> None:
    """So that a model can copy any of them: after a space, in quotes, in the middle of a text."""
    tokenizer = Tokenizer.from_file(str(random_folder / "tokenizer.json"))
    for word in ("Qwerzblat", "zurhof", "Kjøbmand"):
        alone, after = (tokenizer.encode(text).tokens for text in (f'"{word}"', f" {word}"))
        assert [token.removeprefix(folder.SPACE) for token in after] == alone[1:-1]
        assert len(alone) == len(word.encode()) + 2
    for text in ("A red circle.", "图片里有一个红色的圆形。", '{"city": "Zürich"}\n</tool_call>', "tab\t 12 x"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_what_a_grammar_writes_is_not_learnt(random_folder: Path) -> None:
    reader, rng = Reader(random_folder), random.Random(4)
    picture = draw_picture(rng, things=[Thing("red", "star"), Thing("blue", "circle")])
    writer = records.Writer()
    writer.value({"shapes": ["star", "circle"], "count": 2})
    turn = Turn("schema", "What is this?", writer.text, (picture,), given=writer.given)
    assert turn.answer == '{"shapes": ["star", "circle"], "count": 2}'
    assert [turn.answer[start:end] for start, end in turn.given] == ["{", "shapes", "count"]
    (batch,) = [reader.batch("image", [[turn]], rng)]
    learnt = batch.targets[0][batch.targets[0] != IGNORED].tolist()
    text = reader.processor.tokenizer.raw.decode(learnt, skip_special_tokens=False)
    assert "shapes" not in text and "count" not in text
    assert text == '": ["star", "circle"], "": 2}<|im_end|>'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"objects": [{"shape": "star"}, {"shape": "cross"}], "count": 2}', True),
        ('{"count": 2, "objects": [{"shape": "cross"}, {"shape": "star"}]}', True),
        ('{"objects": [{"shape": "star"}], "count": 2}', False),
        ("A star and a cross.", False),
    ],
)
def test_json_is_compared_as_json(answer: str, right: bool) -> None:
    wanted = '{"objects": [{"shape": "star"}, {"shape": "cross"}], "count": 2}'
    sample = evaluation.Sample("json", [], wanted, (), schema=records.schema_of(json.loads(wanted)))
    assert evaluation.is_right(sample, [], answer) is right
    sample = dataclasses.replace(sample, skill="valid")
    assert evaluation.is_right(sample, [], answer) is (answer[0] == "{")


def test_a_call_is_right_with_its_name_and_arguments(speech: Speech) -> None:
    sample = evaluation.make_sample(speech, "tools", "call")
    (call,) = sample.calls
    function = call["function"]
    said = {**function, "arguments": function["arguments"].replace(": ", ":")}
    assert evaluation.is_right(sample, [said], "")
    assert not evaluation.is_right(sample, [said, said], "")
    assert not evaluation.is_right(sample, [], sample.answer)
    assert not evaluation.is_right(sample, [{**said, "name": "other"}], "")
    for other in ('{"a": 1}', '{"a', ""):
        assert not evaluation.is_right(sample, [{**said, "arguments": other}], "")
    assert sample.fields["tools"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A red star and a blue circle.", "A blue circle and a red star.", True),
        ("图片里有一个蓝色的正方形和一个红色的十字。", "图片里有一个红色的十字和一个蓝色的正方形。", True),
        (
            "The first picture shows a red star; the second picture shows a green cross and an orange cross.",
            "The first picture shows a red star; the second picture shows an orange cross and a green cross.",
            True,
        ),
        (
            "The first picture shows a red star; the second picture shows a green cross.",
            "The first picture shows a green cross; the second picture shows a red star.",
            False,
        ),
        (
            "第一张图片里有一个红色的十字；第二张图片里有一个蓝色的圆形。",
            "第一张图片里有一个蓝色的圆形；第二张图片里有一个红色的十字。",
            False,
        ),
        ("Two red stars and an orange circle.", "A red star, an orange circle and a red star.", True),
        (
            "第一张图片里有两个红色的十字；第二张图片里有一个蓝色的圆形。",
            "第一张图片里有一个红色的十字和一个红色的十字；第二张图片里有一个蓝色的圆形。",
            True,
        ),
        ("Three orange crosses.", "An orange cross and an orange cross.", False),
        ("Two red stars.", "A red star.", False),
        ("Two beeps.", "A beep.", False),
        ("A red star.", "A red star and a blue circle.", False),
    ],
)
def test_lists_are_equal_in_any_order(one: str, other: str, equal: bool) -> None:
    assert (dialogs.facts(one) == dialogs.facts(other)) is equal


def test_drawing_is_repeatable() -> None:
    """The same seed gives the same data, whatever the process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport random, zlib, scenes, dialogs\n"
        "p = [scenes.draw_picture(random.Random(seed), style='noise') for seed in range(3)]\n"
        "asks = [ask.english for one in p for ask in dialogs.about_picture(one)]\n"
        "print(zlib.crc32(b''.join(one.pixels.tobytes() for one in p)), zlib.crc32(repr(asks).encode()))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "tools" / "train_demo")],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_answers_and_nothing_else_are_learnt(random_folder: Path, speech: Speech) -> None:
    reader = Reader(random_folder)
    for kind in dialogs.MAKERS:
        for batch in make_batches(reader, speech, kind, 4, f"learnt-{kind}"):
            for ids, targets in zip(batch.token_ids, batch.targets, strict=True):
                learnt = targets != IGNORED
                np.testing.assert_array_equal(targets[learnt], np.roll(ids, -1)[learnt])
                text = reader.processor.tokenizer.raw.decode(targets[learnt].tolist(), skip_special_tokens=False)
                assert text.count("<|im_end|>") == text.strip().count("<|im_end|>") > 0
                assert "user" not in text and "?" not in text


def test_questions_have_one_answer(speech: Speech) -> None:
    """Within one dialog the same question never has two answers."""
    rng = random.Random(7)
    source = dialogs.Source(rng, speech)
    for _ in range(400):
        answers: dict[str, str] = {}
        for turn in dialogs.picture_dialog(source):
            assert answers.setdefault(turn.question, turn.answer) == turn.answer


@pytest.mark.parametrize("skill", dialogs.SKILLS)
def test_every_skill_can_be_examined(skill: str, speech: Speech) -> None:
    for seed in range(20):
        dialog = dialogs.examination(dialogs.Source(random.Random(seed), speech), skill)
        assert dialog[-1].skill == skill
        assert dialogs.facts(dialog[-1].answer) == dialogs.facts(dialog[-1].answer.lower().rstrip(".。"))


def test_lists_are_compared_without_order() -> None:
    assert dialogs.facts("A red circle and a blue star.") == dialogs.facts("a blue star and a red circle")
    assert dialogs.facts("A red circle.") != dialogs.facts("A red circle and a blue star.")
    assert dialogs.facts("图片里有一个红色的圆形。") != dialogs.facts("图片里有一个红色的菱形。")


def test_a_tiny_run_trains_stops_goes_on_and_serves(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/train_demo",
        "train",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
        "--scale",
        "0.05",
        "--recordings",
        "1",
        "--workers",
        "1",
    ]
    subprocess.run([*command, "--steps", "2"], cwd=ROOT, check=True, capture_output=True)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    done = subprocess.run([*command, "--steps", "3"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "steps 2 to 3" in " ".join(done.stdout.split())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first
    lines = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert {"image.loss", "video.loss", "audio.loss", "text.loss"} <= lines[-1].keys()
    with server.running(tmp_path, str(tmp_path / "out")) as found, Client(base_url=found.url) as client:
        reply = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        )
        assert reply.status_code == 200
        assert reply.json()["usage"]["completion_tokens"] >= 1
