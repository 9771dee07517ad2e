"""The contract between a model family and the prompt: sizes -> token counts, media -> features, text -> token ids.

`Processor` itself serves text-only models. A family overrides what differs; most only say their placeholder, count
and pixels. Instances are built once per model and used from several threads: methods keep no state.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.errors import CheckpointError, RequestError, StartupError, UnsupportedModalityError
from sensorium.media.sampling import VideoSampling
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, MediaSpan, Modality, Prompt

_log = logging.getLogger(__name__)

Setting = Callable[[Any], Any]
"""Checks one value of `mm_processor_kwargs` or of preprocessor_config.json; a ValueError says what it must be."""


def integer(minimum: int, maximum: int) -> Setting:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"must be an integer from {minimum} to {maximum}")
        return value

    return check


def number(minimum: float, maximum: float) -> Setting:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
            raise ValueError(f"must be a number from {minimum:g} to {maximum:g}")
        return value

    return check


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


class SettingError(Exception):
    """A setting that the family does not know or cannot use. `Processor` turns it into the error of whoever set it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"'{name}' {problem}")
        self.name = name


@dataclass(frozen=True, slots=True)
class PlaceholderRun:
    """A run of `count` placeholder tokens that takes the rows of media item `item` from `row` on."""

    item: int
    token_id: int
    count: int
    row: int = 0


Piece = NDArray[np.int32] | PlaceholderRun


class Processor:
    modalities: frozenset[Modality] = frozenset()
    settings: ClassVar[Mapping[str, Setting]] = {}  # names of mm_processor_kwargs
    literals: ClassVar[tuple[str, ...]] = ()  # placeholders that are plain text to the tokenizer; escaped in user text
    sample_rate: ClassVar[int] = 16_000  # Hz, of the audio that `process` takes
    takes_recordings: ClassVar[bool] = False  # audio may be as long as recordings that are transcribed
    longest_audio_s: float | None = None  # of a recording, beyond which it is cut; None: all of it is heard

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, overrides: dict[str, Any] | None = None) -> None:
        """`overrides` is `--mm-processor-kwargs`; a key that the family does not know is a StartupError naming it."""
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        try:
            self._apply(overrides or {})
        except SettingError as error:
            raise StartupError(f"mm-processor-kwargs: {error}") from None

    def with_overrides(self, overrides: dict[str, Any]) -> Processor:
        """The same processor with a request's `mm_processor_kwargs`; RequestError names an unknown key or bad value."""
        if not overrides:
            return self
        copied = copy.copy(self)
        try:
            copied._apply({**self.overrides, **overrides})
        except SettingError as error:
            raise RequestError(f"mm_processor_kwargs: {error}.", param=f"mm_processor_kwargs.{error.name}") from None
        return copied

    def implied(self, kinds: Sequence[Modality]) -> dict[str, Any]:
        """Settings that follow from all the media of a prompt, where nobody gives them."""
        return {}

    def placeholder(self, kind: Modality, index: int) -> str:
        """The placeholder of the index-th (0-based, per kind) media item in a prompt, for string-only templates."""
        raise UnsupportedModalityError(kind, param=None)

    def placeholder_id(self, kind: Modality) -> int:
        """The token id that is repeated once per embedding row."""
        raise UnsupportedModalityError(kind, param=None)

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """Prompt tokens that a media item of this size takes, known before it is decoded. MediaError: unusable.

        `frames` counts a video's frames as sampled, and an audio item's samples.
        """
        raise UnsupportedModalityError(kind, param=None)

    def prompt_tokens(self, features: MediaFeatures) -> int:
        """The same of a media item that is processed: exactly, where `num_tokens` may leave out what only its content
        tells."""
        return features.num_rows

    def video_sampling(self) -> VideoSampling:
        """Which frames of a video are to be decoded."""
        return VideoSampling()

    def process(self, item: MediaItem) -> MediaFeatures:
        """Resize, normalise, cut: what the tower eats. Pure; runs in worker threads."""
        raise UnsupportedModalityError(item.kind, param=item.param)

    def build(self, text: str, media: Sequence[MediaFeatures], *, add_special_tokens: bool = False) -> Prompt:
        """Tokenize rendered text and expand its placeholders to the media's rows, in order of appearance per kind.

        Raises RequestError when the number of placeholders and of media differ.
        """
        token_ids = np.array(self.tokenizer.encode(text, add_special_tokens=add_special_tokens), np.int32)
        self._check_counts([kind for _, kind in self._marked(token_ids)], media)
        return self._assemble(self._expanded(token_ids, media), media)

    def cleaned(self, text: str) -> str:
        """A text as this model's tokenizer is to see it, where its files do not say that."""
        return text

    def text_length(self, text: str) -> int:
        """Tokens of a prompt beside its media's rows, told from its text alone: never more than `build` will make."""
        token_ids = self.tokenizer.encode(text)
        markers = {self._marker_id(kind) for kind in self.modalities}
        return sum(token_id not in markers for token_id in token_ids)

    def positions(
        self, token_ids: NDArray[np.int32], spans: Sequence[MediaSpan], media: Sequence[MediaFeatures]
    ) -> tuple[NDArray[np.int32] | NDArray[np.float32] | None, int | float]:
        """(positions [axes, tokens] or None for 0, 1, 2, …, position_delta); see `types.Prompt`."""
        return None, 0

    # What families build on.

    def _configure(self) -> None:
        """Resolve what the family needs from config, preprocessor file and `overrides`; called when these change."""

    def _marker_id(self, kind: Modality) -> int:
        """The token id that stands for one media item in tokenized text, before it is expanded."""
        return self.placeholder_id(kind)

    def _find_marker(self, text: str, fill: int) -> tuple[str, int]:
        """(text, id) of a media item's marker in prompts: `text` if the tokenizer knows it, else its name for `fill`.

        Converted tokenizers may give the marker another id than config.json, whose `fill` is what the rows get.
        """
        marker, name = self.tokenizer.token_to_id(text), self.tokenizer.id_to_token(fill)
        if marker is None and name is None:
            raise StartupError(f"The tokenizer has neither the token {text!r} nor an id {fill} for media.")
        if marker is None or name == text:
            return name or text, fill
        _log.warning("The tokenizer gives %s the id %d, config.json says %d: using config.json's.", text, marker, fill)
        return text, marker

    def _setting(self, name: str, default: Any) -> Any:
        """A setting's value: the request's or operator's, else the preprocessor file's, else `default`."""
        return self._value(self.checkpoint.preprocessor, name, default)

    def _value(self, files: Mapping[str, Any], name: str, default: Any) -> Any:
        """The same with another file's contents."""
        if name in self.overrides:
            return self.overrides[name]
        value = files.get(name)
        if value is None:
            return default
        try:
            return self.settings[name](value)
        except ValueError as error:
            raise CheckpointError(f"{self._name_of(files)}: '{name}' {error}") from None

    def _name_of(self, files: Mapping[str, Any]) -> str:
        prefix = "video_" if files is self.checkpoint.video_preprocessor else ""
        return f"{prefix}preprocessor_config.json"

    def _feature_key(self, item: MediaItem) -> bytes:
        """What the tower's output depends on: the media item's content and every setting that may alter its pixels."""
        return hashlib.sha256(item.key + self._identity).digest()

    def _assemble(self, pieces: Iterable[Piece], media: Sequence[MediaFeatures]) -> Prompt:
        """Join text and runs of placeholders. Every piece is copied once, so that time is linear in the prompt."""
        chunks: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        spans: list[MediaSpan] = []
        offset = 0
        for piece in pieces:
            if isinstance(piece, PlaceholderRun):
                chunk = np.full(piece.count, piece.token_id, np.int32)
                spans.append(MediaSpan(piece.item, offset, piece.count, piece.row))
            else:
                chunk = piece
            chunks.append(chunk)
            offset += len(chunk)
        token_ids = np.concatenate(chunks)
        positions, delta = self.positions(token_ids, spans, media)
        return Prompt(token_ids, tuple(media), tuple(spans), positions, delta)

    def _expanded(self, token_ids: NDArray[np.int32], media: Sequence[MediaFeatures]) -> Iterator[Piece]:
        """Replace the n-th marker of a kind by the n-th run of rows of that kind."""
        runs = {kind: iter(self._runs(kind, media)) for kind in self.modalities}
        start = 0
        for place, kind in self._marked(token_ids):
            yield token_ids[start:place]
            yield next(runs[kind])
            start = place + 1
        yield token_ids[start:]

    def _marked(self, token_ids: NDArray[np.int32]) -> list[tuple[int, Modality]]:
        """Where media's markers are, and what they stand for."""
        kinds = {self._marker_id(kind): kind for kind in self.modalities}
        places = np.flatnonzero(np.isin(token_ids, list(kinds)))
        return [(place, kinds[int(token_ids[place])]) for place in places.tolist()]

    def _runs(self, kind: Modality, media: Sequence[MediaFeatures]) -> Iterator[PlaceholderRun]:
        """What takes the places of the markers of a kind, in their order."""
        for item, one in enumerate(media):
            if one.kind == kind:
                yield PlaceholderRun(item, self.placeholder_id(kind), one.num_rows)

    def _check_counts(self, found: Sequence[Modality], media: Sequence[MediaFeatures]) -> None:
        """`found`: the kind of every placeholder in the prompt."""
        given = [one.kind for one in media]
        for kind in dict.fromkeys((*given, *found)):
            if kind not in self.modalities:
                raise UnsupportedModalityError(kind, param=None)
            if found.count(kind) != given.count(kind):
                raise RequestError(
                    f"The prompt has {found.count(kind)} {kind} placeholder(s), but the request brings "
                    f"{given.count(kind)} {kind}(s). Each {kind} needs exactly one.",
                    code="media_count_mismatch",
                )

    def _apply(self, overrides: Mapping[str, Any]) -> None:
        self.overrides = {name: self._checked(name, value) for name, value in overrides.items()}
        files = [self.checkpoint.preprocessor, self.checkpoint.video_preprocessor]
        settings = json.dumps([*files, self.overrides], sort_keys=True)
        self._identity = hashlib.sha256(f"{type(self).__name__} {settings}".encode()).digest()
        self._configure()

    def _checked(self, name: str, value: Any) -> Any:
        if name not in self.settings:
            known = ", ".join(sorted(self.settings)) or "none"
            raise SettingError(name, f"is not a setting of this model's processor (known: {known})")
        try:
            return self.settings[name](value)
        except ValueError as error:
            raise SettingError(name, str(error)) from None


class MarkedProcessor(Processor):
    """Takes one kind of media, each item marked by one token in prompts. A family says `_text`, which stands for an
    item in texts, `_marker`, the token of it that is replaced, and `_fill`, the id that is repeated once per row."""

    _text: str
    _marker: int
    _fill: int

    def placeholder(self, kind: Modality, index: int) -> str:
        return self._text if kind in self.modalities else super().placeholder(kind, index)

    def placeholder_id(self, kind: Modality) -> int:
        return self._fill if kind in self.modalities else super().placeholder_id(kind)

    def _marker_id(self, kind: Modality) -> int:
        return self._marker


class ImageProcessor(MarkedProcessor):
    modalities: frozenset[Modality] = frozenset({"image"})
