"""Whisper: a recording as log-mel frames, the windows of it that the encoder takes, and the tokens that ask for text.

Sources: Radford et al. 2022; transformers' WhisperFeatureExtractor: a recording that fits into one window is padded
with silence to its length, a longer one is transformed whole, and what its last window lacks are zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError, UnsupportedModalityError
from sensorium.processors.audio import FFT_SAMPLES, HOP_SAMPLES, SAMPLE_RATE, log_mel
from sensorium.processors.base import Processor
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import MediaFeatures, MediaItem, Modality, SpeechRules

SECONDS_OF_TIMESTAMP = 0.02
EXTRACTOR: Mapping[str, int] = {"sampling_rate": SAMPLE_RATE, "hop_length": HOP_SAMPLES, "n_fft": FFT_SAMPLES}
LANGUAGE_CODES = """
    en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml cy
    sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo
    uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue""".split()


@dataclass(frozen=True, slots=True)
class SpeechTokens:
    """The ids that steer a Whisper checkpoint. `languages`, by code, is empty for models of English alone."""

    start: int
    end: int
    no_timestamps: int
    previous: int | None
    languages: Mapping[str, int]
    tasks: Mapping[str, int]  # transcribe, translate
    never: tuple[int, ...]
    never_first: tuple[int, ...]
    max_initial: int | None

    @property
    def first_timestamp(self) -> int:
        return self.no_timestamps + 1

    @property
    def no_speech(self) -> int:
        """Its probability, as what follows the start token, tells silence."""
        return self.no_timestamps - 1

    def rules(self, *, timestamps: bool) -> SpeechRules:
        first = self.first_timestamp if timestamps else None
        return SpeechRules(self.end, self.never, self.never_first, first, self.max_initial)

    def beginning(self, language: str | None, task: str, *, timestamps: bool) -> list[int]:
        """The tokens that a window's text follows."""
        ids = [self.start]
        if self.languages:
            ids += [self.languages[language or "en"], self.tasks[task]]
        return ids if timestamps else [*ids, self.no_timestamps]


class WhisperProcessor(Processor):
    modalities: frozenset[Modality] = frozenset({"audio"})
    sample_rate: ClassVar[int] = SAMPLE_RATE
    takes_recordings: ClassVar[bool] = True

    def _configure(self) -> None:
        config, stated = self.checkpoint.config, self.checkpoint.preprocessor
        self.num_rows = positive_int(config, "max_source_positions", 1500)
        self.num_mel_bins = positive_int(config, "num_mel_bins", 80)
        for name, value in {**EXTRACTOR, "feature_size": self.num_mel_bins}.items():
            if stated.get(name, value) != value:
                raise CheckpointError(f"preprocessor_config.json: {name} must be {value}, not {stated[name]}")
        self.window_frames = 2 * self.num_rows
        self.speech = speech_tokens(self.checkpoint, self.tokenizer)
        self.most_prompt = positive_int(config, "max_target_positions", 448) // 2 - 1

    def placeholder(self, kind: Modality, index: int) -> str:
        raise UnsupportedModalityError(kind, param=None)  # there is no chat to put a recording into

    def placeholder_id(self, kind: Modality) -> int:
        return -1

    def num_tokens(self, kind: Modality, height: int, width: int, frames: int = 1) -> int:
        """None: recordings stand beside the prompt."""
        return 0 if kind == "audio" else super().num_tokens(kind, height, width, frames)

    def process(self, item: MediaItem) -> MediaFeatures:
        """The whole recording: `mel` [bins, frames], and `frames` of them that are its own, int64 [1]."""
        if item.kind != "audio":
            raise UnsupportedModalityError(item.kind, param=item.param)
        samples = item.data.astype(np.float32, copy=False)
        short = self.window_frames * HOP_SAMPLES - len(samples)
        mel = log_mel(np.pad(samples, (0, short)) if short > 0 else samples, self.num_mel_bins)
        frames = np.array([min(-(-len(samples) // HOP_SAMPLES), mel.shape[1])], np.int64)
        return MediaFeatures("audio", self._feature_key(item), self.num_rows, {"mel": mel, "frames": frames})

    def window(self, recording: MediaFeatures, first: int) -> MediaFeatures:
        """What the encoder takes of a recording from frame `first` on."""
        whole = recording.arrays["mel"]
        mel = np.zeros((len(whole), self.window_frames), np.float32)
        part = whole[:, first : first + self.window_frames]
        mel[:, : part.shape[1]] = part
        key = hashlib.sha256(recording.key + first.to_bytes(8, "little")).digest()
        return MediaFeatures("audio", key, self.num_rows, {"mel": mel})

    def previous_ids(self, text: str) -> list[int]:
        """A text that comes before the recording, as tokens that stand before its beginning: the end of it where it is
        long. Control tokens in it are letters."""
        if self.speech.previous is None or not text.strip():
            return []
        ids = self.tokenizer.encode(self.tokenizer.escape(" " + text.strip()))
        return [self.speech.previous, *ids[-self.most_prompt :]]

    def text_of(self, ids: NDArray[np.int32] | list[int]) -> str:
        """Without timestamps and control tokens."""
        kept = [int(one) for one in ids if one < self.speech.no_timestamps and one not in self.tokenizer.special_ids]
        return self.tokenizer.decode(kept)


def speech_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> SpeechTokens:
    """From generation_config.json, or where it says nothing by the tokens' texts. CheckpointError names what is
    missing."""
    stated = checkpoint.generation or checkpoint.config

    def token(key: str, text: str) -> int:
        found = stated.get(key, checkpoint.config.get(key))
        found = tokenizer.token_to_id(text) if found is None else found
        if not isinstance(found, int):
            raise CheckpointError(f"generation_config.json: {key} is missing, and the tokenizer has no {text}")
        return found

    no_timestamps = token("no_timestamps_token_id", "<|notimestamps|>")
    previous = stated.get("prev_sot_token_id", tokenizer.token_to_id("<|startofprev|>"))
    ends = stated.get("eos_token_id", checkpoint.config.get("eos_token_id", checkpoint.stop_token_ids[0]))
    latest = stated.get("max_initial_timestamp_index")
    return SpeechTokens(
        start=token("decoder_start_token_id", "<|startoftranscript|>"),
        end=int(ends[0] if isinstance(ends, list) else ends),
        no_timestamps=no_timestamps,
        previous=previous,
        languages=_languages(stated, checkpoint.vocab_size, tokenizer),
        tasks=_tasks(stated, tokenizer),
        never=tuple(stated.get("suppress_tokens") or ()),
        never_first=tuple(stated.get("begin_suppress_tokens") or ()),
        max_initial=latest if isinstance(latest, int) else None,
    )


def _languages(stated: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer) -> dict[str, int]:
    """Code -> id; {} for a model of English alone, whose tokenizer has the tokens too."""
    if stated.get("is_multilingual", vocab_size != 51864) is False or vocab_size == 51864:
        return {}
    named = stated.get("lang_to_id") or {f"<|{code}|>": tokenizer.token_to_id(f"<|{code}|>") for code in LANGUAGE_CODES}
    return {text.strip("<|>"): token for text, token in named.items() if token is not None}


def _tasks(stated: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, int]:
    named = stated.get("task_to_id") or {
        one: tokenizer.token_to_id(f"<|{one}|>") for one in ("transcribe", "translate")
    }
    return {task: token for task, token in named.items() if token is not None}
