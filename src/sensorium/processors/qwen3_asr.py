"""Qwen3-ASR: clips of any length, 13 rows to the second. A completion names the language before the text.

Source: the published qwen_asr package, transformers' Qwen3ASRProcessor. A clip is heard to half a second at least: the
silence behind a shorter one counts as the clip's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.values import positive_int
from sensorium.processors.audio import HOP_SAMPLES, log_mel
from sensorium.processors.speech import SpeechProcessor
from sensorium.processors.transcripts import Transcriber, Transcript

MIN_SAMPLES = 8000
TAG = "<asr_text>"
HEADER = "language "
LONGEST_HEADER = 64  # characters that are held back in the hope of a tag
LANGUAGES: Mapping[str, str] = dict(
    entry.split(" ", 1)
    for entry in """ar Arabic,yue Cantonese,zh Chinese,cs Czech,da Danish,nl Dutch,en English,fil Filipino,fi Finnish,\
fr French,de German,el Greek,hi Hindi,hu Hungarian,id Indonesian,it Italian,ja Japanese,ko Korean,mk Macedonian,\
ms Malay,fa Persian,pl Polish,pt Portuguese,ro Romanian,ru Russian,es Spanish,sv Swedish,th Thai,tr Turkish,\
vi Vietnamese""".split(",")
)
"""By code, as the model writes them."""
_CODES: Mapping[str, str] = {name.lower(): code for code, name in LANGUAGES.items()}
_REPEATED_CHARACTER = re.compile(r"(.)\1{20,}", re.DOTALL)
_REPEATED_PATTERN = re.compile(r"(?=.{40})(.{1,20}?)\1{19,}", re.DOTALL)


def without_loops(text: str) -> str:
    """A character that stands there more than twenty times in a row, or a pattern of up to twenty characters that does
    so twenty times or more, once: the published package's repair."""
    return _REPEATED_PATTERN.sub(r"\1", _REPEATED_CHARACTER.sub(r"\1", text))


def split(completion: str) -> tuple[str | None, str]:
    """Language and text of "language English<asr_text>text". "None" is no language, and no tag no header."""
    header, tag, text = completion.partition(TAG)
    if not tag:
        return None, completion.strip()
    said = next((line.strip() for line in header.splitlines() if line.strip()), "")
    name = said[len(HEADER) :].strip() if f"{said} ".lower().startswith(HEADER) else said
    if header.strip().lower() == "language none" or not name:
        return None, text.strip()
    return _CODES.get(name.lower(), name), text.strip()


class TaggedTranscript(Transcript):
    """Without a language that was asked for, the beginning of a completion is held back until its tag comes."""

    def __init__(self, language: str | None) -> None:
        super().__init__(language)
        self._held: str | None = "" if language is None else None

    def push(self, text: str) -> str:
        if self._held is None:
            return text
        self._held += text
        if TAG in self._held:
            return self.finish()
        begun = self._held.lstrip().lower()
        is_header = begun.startswith(HEADER) and len(begun) <= LONGEST_HEADER
        may_be_header = is_header or HEADER.startswith(begun) or TAG.startswith(begun)
        return "" if may_be_header else self.finish()

    def finish(self) -> str:
        held, self._held = self._held, None
        if not held:
            return ""
        self.language, _ = split(held)
        return held.partition(TAG)[2].lstrip() if TAG in held else held

    def whole(self, completion: str) -> str:
        text = without_loops(completion.strip())
        if self.language is not None:
            return text
        self.language, text = split(text)
        return text


def chunked_rows(frames: int, chunk: int) -> int:
    """Rows of so many mel frames: what three strided convolutions leave of every chunk."""

    def convolved(count: int) -> int:
        for _ in range(3):
            count = (count - 1) // 2 + 1
        return count

    return frames // chunk * convolved(chunk) + (convolved(frames % chunk) if frames % chunk else 0)


class Qwen3AsrProcessor(Transcriber, SpeechProcessor):
    literals: ClassVar[tuple[str, ...]] = (TAG,)
    spoken: ClassVar[Iterable[str]] = tuple(LANGUAGES)
    marks: ClassVar[tuple[str, str, str]] = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
    token_id: ClassVar[int] = 151676

    def _configure(self) -> None:
        super()._configure()
        self._chunk = 2 * positive_int(self._audio, "n_window", 50)

    def transcription(self, language: str | None, context: str) -> str:
        """The context is the system's turn, which is there without one, too; the language begins the completion."""
        begun = f"language {LANGUAGES[language]}{TAG}" if language else ""
        return (
            f"<|im_start|>system\n{self.tokenizer.with_literals(self.literals).escape(context)}<|im_end|>\n"
            f"<|im_start|>user\n{self._text}<|im_end|>\n<|im_start|>assistant\n{begun}"
        )

    def transcript(self, language: str | None) -> Transcript:
        return TaggedTranscript(language)

    def _num_rows(self, samples: int) -> int:
        return chunked_rows(max(samples, MIN_SAMPLES) // HOP_SAMPLES, self._chunk)

    def _features(self, samples: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
        return {"mel": log_mel(np.pad(samples, (0, max(MIN_SAMPLES - len(samples), 0))), self._mel_bins)}
