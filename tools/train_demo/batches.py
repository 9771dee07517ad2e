"""Dialogs as arrays: tokens, positions and pixels come from the server's own processor, so that both see the same.

Beside the answers, every row of a tower has labels of what is there (`LABELS`), which train the towers directly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dialogs
import numpy as np
from looks import Layout, Look, Seen, looks_at_beeps, looks_at_copies, looks_at_functions, looks_at_pictures
from numpy.typing import NDArray
from scenes import Clip, Picture, Placed, draw_number, draw_picture
from sounds import RATE, SPOKEN, Sound, Speech
from words import COLOURS, SHAPES

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.processors.qwen2_omni import Qwen2OmniProcessor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality, Prompt

IGNORED = -100
WIDE = 0.4  # share of media beyond the examination's ranges
PLACES = 10  # from one edge of a picture to the other
RANKS = 6  # of one, two or three things, which one it is
TONES = ("rising", "falling", "steady")
LABELS = {
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "digit": 11,
    "next_digit": 11,
    "x": 1 + PLACES,
    "y": 1 + PLACES,
    "across": 1 + RANKS,
    "down": 1 + RANKS,
    "onset": 2,
    "sound": 2 + len(TONES) + len(SPOKEN),
}  # classes; 0 is nothing
PROMPTS = ("You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.", "Be concise.")


@dataclass(slots=True)
class Batch:
    """Dialogs of one kind. Media are grouped by the size that their tower sees; `rows` undoes the grouping."""

    kind: str
    token_ids: NDArray[np.int64]  # [dialogs, tokens]
    targets: NDArray[np.int64]  # the same, what comes next, or IGNORED
    positions: NDArray[np.int64]  # [3, dialogs, tokens]
    places: NDArray[np.int64]  # [rows], in the flattened tokens
    rows: NDArray[np.int64]  # [rows], of the grouped rows, the one that belongs to each place
    groups: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # [rows], in the order of `places`
    looks: list[tuple[int, Look]] = field(default_factory=list)  # each with its dialog


class Reader:
    """Turns dialogs into tokens with a folder's tokenizer and processor."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        tokenizer = Tokenizer.from_folder(folder, vocab_size=checkpoint.vocab_size)
        self.processor = Qwen2OmniProcessor(checkpoint, tokenizer)
        self.template = LocalTemplate(
            checkpoint.chat_template or "",
            tokenizer,
            modalities=self.processor.modalities,
            placeholder=self.processor.placeholder,
        )
        self.header = tokenizer.encode("<|im_start|>assistant\n")
        self.end = tokenizer.encode("<|im_end|>")[0]
        self.pad = tokenizer.encode("<|endoftext|>")[0]

    def features(self, medium: dialogs.Medium) -> MediaFeatures:
        if isinstance(medium, Picture):
            item = MediaItem("image", medium.pixels, b"")
        elif isinstance(medium, Clip):
            item = MediaItem("video", medium.frames, b"", duration_s=medium.seconds)
        else:
            item = MediaItem("audio", medium.samples, b"", sample_rate=RATE)
        return self.processor.process(item)

    def batch(self, kind: str, talks: Sequence[dialogs.Dialog], rng: random.Random) -> Batch:
        prompts, layouts, media, labels, looks = [], [], [], [], []
        for index, dialog in enumerate(talks):
            own = [medium for turn in dialog for medium in turn.media]
            features = [self.features(medium) for medium in own]
            text = self.rendered(dialog, rng)
            prompts.append(self.processor.build(text, features))
            layouts.append(self._layout(text, prompts[-1]))
            media += features
            shown = [labels_of(medium, one) for medium, one in zip(own, features, strict=True)]
            labels += shown
            looks += [(index, look) for look in self._looks(kind, dialog, layouts[-1], prompts[-1], shown)]
        length = -(-max(len(prompt.token_ids) for prompt in prompts) // 16) * 16
        token_ids = np.full((len(prompts), length), self.pad, np.int64)
        targets = np.full_like(token_ids, IGNORED)
        positions = np.zeros((3, *token_ids.shape), np.int64)
        places = []
        for index, prompt in enumerate(prompts):
            ids = np.asarray(prompt.token_ids, np.int64)
            token_ids[index, : len(ids)] = ids
            positions[:, index, : len(ids)] = np.arange(len(ids)) if prompt.positions is None else prompt.positions
            self._mark(ids, targets[index])
            _leave_out(talks[index], layouts[index], targets[index])
            places += [np.arange(span.offset, span.offset + span.length) + index * length for span in prompt.spans]
        batch = Batch(
            kind,
            token_ids,
            targets,
            positions,
            np.concatenate([*places, np.zeros(0, np.int64)]),
            np.zeros(0, np.int64),
            looks=looks,
        )
        _attach(batch, media, labels)
        return batch

    def rendered(self, dialog: dialogs.Dialog, rng: random.Random) -> str:
        """The chat template's text; sometimes there is a system message."""
        messages = [Message("system", (TextPart(rng.choice(PROMPTS)),))] if rng.random() < 0.15 else []
        for turn in dialog:
            media = [MediaPart(kind_of(medium)) for medium in turn.media]
            messages.append(Message(turn.role, (*media, TextPart(turn.question))))
            if turn.calls:
                messages.append(Message("assistant", (), extra={"tool_calls": list(turn.calls)}))
            else:
                messages.append(Message("assistant", (TextPart(turn.answer),)))
        tools = [tool for turn in dialog for tool in turn.tools]
        return self.template.render(messages, add_generation_prompt=False, tools=tools or None)

    def _layout(self, text: str, prompt: Prompt) -> Layout:
        offsets = self.processor.tokenizer.raw.encode(text, add_special_tokens=False).offsets
        lengths = {span.offset: span.length for span in prompt.spans}
        places = np.zeros(len(offsets), np.int64)
        for index in range(1, len(offsets)):
            places[index] = places[index - 1] + lengths.get(int(places[index - 1]), 1)
        return Layout(text, np.array([start for start, _ in offsets]), places)

    def _looks(
        self,
        kind: str,
        dialog: dialogs.Dialog,
        layout: Layout,
        prompt: Prompt,
        shown: Sequence[dict[str, NDArray[np.int64]]],
    ) -> Iterator[Look]:
        yield from looks_at_copies(dialog, layout)
        yield from looks_at_functions(dialog, layout)
        if kind == "audio":
            ((labels, span),) = zip(shown, prompt.spans, strict=True)
            onsets = span.offset + np.flatnonzero(labels["onset"])
            yield from looks_at_beeps(dialog, layout, onsets.tolist()) if len(onsets) else ()
        if kind != "image":
            return
        turns = [number for number, turn in enumerate(dialog) for _ in turn.media]
        seen = [
            Seen(
                labels["shape"],
                labels["colour"],
                labels["across"],
                np.arange(span.offset, span.offset + span.length),
                turn,
            )
            for labels, span, turn in zip(shown, prompt.spans, turns, strict=True)
        ]
        yield from looks_at_pictures(dialog, layout, seen)

    def drawn(self, pictures: Sequence[Picture]) -> Batch:
        """Only what the vision tower needs to learn its labels: many pictures at little cost."""
        features = [self.features(picture) for picture in pictures]
        nothing = np.zeros(0, np.int64)
        batch = Batch("drawn", nothing, nothing, nothing, nothing, nothing)
        _attach(batch, features, [labels_of(picture, one) for picture, one in zip(pictures, features, strict=True)])
        return batch

    def _mark(self, ids: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Answers, with the mark that ends them, are what is learnt."""
        width = len(self.header)
        for start in np.flatnonzero(ids == self.header[0]):
            if ids[start : start + width].tolist() == self.header:
                end = start + width + int(np.flatnonzero(ids[start + width :] == self.end)[0])
                targets[start + width - 1 : end] = ids[start + width : end + 1]


def _leave_out(dialog: dialogs.Dialog, layout: Layout, targets: NDArray[np.int64]) -> None:
    """What a grammar writes is not learnt."""
    if not any(turn.given for turn in dialog):
        return
    for _, answer, turn in layout.turns(dialog):
        for start, end in turn.given:
            for token in layout.tokens(answer + start, answer + end):
                targets[token - 1] = IGNORED


def _attach(batch: Batch, media: Sequence[MediaFeatures], labels: Sequence[dict[str, NDArray[np.int64]]]) -> None:
    """Give a batch its media, grouped for the tower, and the labels of their rows."""
    if media:
        batch.groups, batch.rows = (group_sounds if batch.kind == "audio" else group_slices)(media)
        names = dict.fromkeys(name for one in labels for name in one)
        nothing = [np.zeros_like(next(iter(one.values()))) for one in labels]  # a clip shows no digits
        batch.labels = {
            name: np.concatenate([one.get(name, rest) for one, rest in zip(labels, nothing, strict=True)])
            for name in names
        }


def kind_of(medium: dialogs.Medium) -> Modality:
    kinds: dict[type, Modality] = {Picture: "image", Clip: "video", Sound: "audio"}
    return kinds[type(medium)]


def labels_of(medium: dialogs.Medium, features: MediaFeatures) -> dict[str, NDArray[np.int64]]:
    if isinstance(medium, Sound):
        return _sound_labels(medium, features.num_rows)
    _, lines, columns = features.arrays["grid"].tolist()  # type: ignore[misc]
    size = (lines // 2, columns // 2)
    if isinstance(medium, Picture):
        aspect = medium.pixels.shape[1] / medium.pixels.shape[0]
        cells = _cells(medium.objects, size, aspect)
        cells |= _digit_cells(medium, size)
        return {name: cell.flatten() for name, cell in cells.items()}
    aspect = medium.frames.shape[2] / medium.frames.shape[1]
    slices = [_cells([medium.path[i]], size, aspect) for i in range(0, len(medium.path), 2)]
    return {name: np.concatenate([cells[name].flatten() for cells in slices]) for name in slices[0]}


def _cells(objects: Sequence[Placed], size: tuple[int, int], aspect: float) -> dict[str, NDArray[np.int64]]:
    """What lies on each row of the tower, certain inside and ignored about the edges, and where that thing is, or the
    row itself: nothing else tells the decoder, whose positions hardly differ within so small a picture."""
    cells = {name: np.zeros(size, np.int64) for name in ("shape", "colour", "across", "down")}
    y, x = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1], indexing="ij")
    unit_x, unit_y = min(1, 1 / aspect), min(1, aspect)
    column, line = 1 + (x * PLACES).astype(np.int64), 1 + (y * PLACES).astype(np.int64)
    lefts, tops = sorted(placed.x for placed in objects), sorted(placed.y for placed in objects)
    first = 1 + len(objects) * (len(objects) - 1) // 2
    for placed in objects:
        away = np.hypot((x - placed.x) / unit_x, (y - placed.y) / unit_y)
        inside = away < 0.75 * placed.radius
        about = (away < 1.2 * placed.radius + 0.12) & ~inside
        inside[min(size[0] - 1, int(placed.y * size[0])), min(size[1] - 1, int(placed.x * size[1]))] = True
        values = {
            "shape": list(SHAPES).index(placed.thing.shape),
            "colour": list(COLOURS).index(placed.thing.colour),
            "across": first - 1 + lefts.index(placed.x),
            "down": first - 1 + tops.index(placed.y),
        }
        for name, value in values.items():
            labels = cells[name]
            labels[about & (labels == 0)] = IGNORED
            labels[inside] = 1 + value
        column[inside] = 1 + min(PLACES - 1, max(0, int(placed.x * PLACES)))
        line[inside] = 1 + min(PLACES - 1, max(0, int(placed.y * PLACES)))
    return {**cells, "x": column, "y": line}


def _digit_cells(picture: Picture, size: tuple[int, int]) -> dict[str, NDArray[np.int64]]:
    first, second = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for digit, (x, y) in zip(picture.number, picture.digits, strict=True):
        cell = min(size[0] - 1, max(0, int(y * size[0]))), min(size[1] - 1, max(0, int(x * size[1])))
        (second if first[cell] > 0 else first)[cell] = 1 + int(digit)
    return {"digit": first, "next_digit": second}


def _sound_labels(sound: Sound, rows: int) -> dict[str, NDArray[np.int64]]:
    """What is heard on each row, and where a beep begins."""
    names = ("", "beeps", *TONES)
    value = names.index(sound.kind) if sound.kind in names else len(names) + SPOKEN.index(sound.word)
    middle = (np.arange(rows) + 0.5) / 25
    labels, onset = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for start, end in sound.spans:
        heard = np.flatnonzero((middle >= start) & (middle < end))
        labels[heard] = value
        if sound.kind == "beeps":
            onset[heard[:1]] = 1
    return {"sound": labels, "onset": onset}


def group_slices(media: Sequence[MediaFeatures]) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """Slices (pictures, pairs of frames) of one size together: patches float32 [slices, patches, 3 * 2 * side²]."""
    by_grid: dict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = {}
    sizes: list[int] = []  # rows of every slice, in order
    for one in media:
        groups, lines, columns = one.arrays["grid"].tolist()  # type: ignore[misc]
        pixels = np.asarray(one.arrays["pixels"]).reshape(groups, lines * columns, 3, -1).astype(np.float32)
        pixels = pixels * np.asarray(one.arrays["scale"])[:, None] + np.asarray(one.arrays["shift"])[:, None]
        if pixels.shape[-1] == 14 * 14:
            pixels = np.concatenate([pixels, pixels], -1)  # a picture is its own second frame
        for part in pixels:
            by_grid.setdefault((lines, columns), []).append((len(sizes), part.reshape(lines * columns, -1)))
            sizes.append(lines * columns // 4)
    starts = np.cumsum([0, *sizes])
    rows = np.zeros(starts[-1], np.int64)
    groups_out, at = [], 0
    for grid, parts in by_grid.items():
        groups_out.append({"grid": grid, "patches": np.stack([part for _, part in parts])})
        for index, _ in parts:
            rows[starts[index] : starts[index + 1]] = np.arange(at, at + sizes[index])
            at += sizes[index]
    return groups_out, rows


def group_sounds(media: Sequence[MediaFeatures], window: int = 200) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    windows, lengths, clips = [], [], []
    for one in media:
        mel = np.asarray(one.arrays["mel"], np.float32)
        clips.append(list(range(len(windows), len(windows) + math.ceil(mel.shape[1] / window))))
        for start in range(0, mel.shape[1], window):
            part = mel[:, start : start + window]
            lengths.append(part.shape[1])
            windows.append(np.pad(part, ((0, 0), (0, window - part.shape[1]))))
    total = sum(one.num_rows for one in media)
    return [{"windows": np.stack(windows), "lengths": np.array(lengths), "clips": clips}], np.arange(total)


def make_batches(
    reader: Reader, speech: Speech, kind: str, size: int, seed: str, parts: int = 1, part: int = 0
) -> list[Batch]:
    """One of `parts` of `size` dialogs, the short and the long ones apart; of the kind "drawn", pictures that nobody
    talks about."""
    if kind in MEDIA:  # are dear to draw: each part draws its own
        seed, size, parts, part = f"{seed}-{part}", (size + part) // parts, 1, 0
    rng = random.Random(seed)
    if kind == "drawn":
        draw = (draw_number if rng.random() < 0.6 else draw_picture for _ in range(size))
        return [reader.drawn([one(rng, wide=rng.random() < WIDE) for one in draw])]
    source = dialogs.Source(rng, speech, wide=WIDE)
    talks = sorted((dialogs.make(source, kind) for _ in range(size)), key=lambda dialog: _weight(kind, dialog))
    most = -(-size // parts)
    chosen = talks[part * most : (part + 1) * most]
    return [reader.batch(kind, chosen, rng)] if chosen else []


MEDIA = ("image", "video", "audio", "drawn")


def _weight(kind: str, dialog: dialogs.Dialog) -> float:
    """About as many tokens as the dialog has."""
    words = sum(8 + (len(turn.question) + len(turn.answer)) / 4 for turn in dialog)
    media = [medium for turn in dialog for medium in turn.media]
    if kind == "audio":
        return words + sum(25 * len(sound.samples) / RATE for sound in media)  # type: ignore[union-attr]
    return words + 16 * len(media) + 18 * sum(len(turn.tools) for turn in dialog)
