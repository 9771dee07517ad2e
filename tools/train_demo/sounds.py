"""Sounds: beeps, gliding or steady tones, and words spoken by espeak-ng. Mono, 16 kHz, float32 within -1 to 1."""

from __future__ import annotations

import random
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from voice import Voice
from words import COLOURS, NUMBERS

Samples = NDArray[np.float32]

RATE = 16_000  # Hz
SPOKEN = (*NUMBERS, *COLOURS)
VOICES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5")


@dataclass(frozen=True, slots=True)
class Sound:
    samples: Samples
    kind: str  # "beeps", "rising", "falling", "steady" or "speech"
    beeps: int = 0
    word: str = ""
    spans: tuple[tuple[float, float], ...] = ()  # seconds in which something is heard


def wave_of(rng: random.Random, phase: NDArray[np.float64]) -> NDArray[np.float64]:
    """A sine, a triangle, or a sine with overtones, of a phase in turns."""
    kind = rng.random()
    sine = np.sin(2 * np.pi * phase)
    if kind < 0.6:
        return sine
    if kind < 0.8:
        return 2 / np.pi * np.arcsin(sine)
    return (sine + 0.4 * np.sin(4 * np.pi * phase) + 0.2 * np.sin(6 * np.pi * phase)) / 1.3


def faded(samples: NDArray[np.float64], seconds: float = 0.01) -> NDArray[np.float64]:
    length = min(len(samples) // 2, int(seconds * RATE))
    ramp = np.linspace(0, 1, length, endpoint=False)
    samples[:length] *= ramp
    samples[len(samples) - length :] *= ramp[::-1]
    return samples


def silence(seconds: float) -> NDArray[np.float64]:
    return np.zeros(int(seconds * RATE))


def finished(rng: random.Random, samples: NDArray[np.float64]) -> Samples:
    """At some loudness, with some noise, or none."""
    samples = samples * (rng.uniform(0.15, 0.95) / max(1e-6, float(np.abs(samples).max())))
    if rng.random() < 0.6:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(samples))
        samples = samples + noise * 10 ** rng.uniform(-4.5, -2.2)
    return np.clip(samples, -1, 1).astype(np.float32)


def make_beeps(rng: random.Random, count: int = 0, *, wide: bool = False) -> Sound:
    """One to five beeps of one pitch, evenly apart or nearly. `wide`: of more pitches, lengths and distances, and they
    may begin and end at once."""
    count = count or rng.randrange(1, 6)
    pitch, length, gap = rng.uniform(350, 2200), rng.uniform(0.08, 0.28), rng.uniform(0.12, 0.4)
    fade = 0.01
    if wide:
        pitch, length, gap = rng.uniform(250, 3000), rng.uniform(0.06, 0.45), rng.uniform(0.1, 0.6)
        fade = rng.choice((0.0, 0.003, 0.02))
    parts, spans, at = [silence(start := rng.uniform(0.02, 0.35))], [], start
    timbre = rng.getrandbits(32)
    for index in range(count):
        time = np.arange(int(length * RATE)) / RATE
        parts.append(faded(wave_of(random.Random(timbre), time * pitch), fade))
        spans.append((at, at + length))
        pause = gap * rng.uniform(0.9, 1.1) if index < count - 1 else rng.uniform(0.05, 0.35)
        parts.append(silence(pause))
        at += length + pause
    return Sound(finished(rng, np.concatenate(parts)), "beeps", beeps=count, spans=tuple(spans))


def make_tone(rng: random.Random, kind: str = "", *, wide: bool = False) -> Sound:
    kind = kind or rng.choice(("rising", "falling", "steady"))
    seconds = rng.uniform(0.5, 4.0) if wide else rng.uniform(0.8, 2.6)
    low = rng.uniform(150, 1200) if wide else rng.uniform(200, 1200)
    high = low if kind == "steady" else low * rng.uniform(1.4 if wide else 1.5, 4.0 if wide else 3.0)
    part = np.linspace(0, 1, int(seconds * RATE))
    glide = part if kind != "falling" else 1 - part
    pitch = low * (high / low) ** glide if rng.random() < 0.5 else low + (high - low) * glide
    start, end, fade = rng.uniform(0, 0.3), rng.uniform(0, 0.3), 0.03
    if wide:  # as a file may hold it that somebody has computed
        start, end, fade = rng.choice((0.0, start)), rng.choice((0.0, end)), rng.choice((0.0, 0.01, 0.1))
    samples = np.concatenate([silence(start), faded(wave_of(rng, np.cumsum(pitch) / RATE), fade), silence(end)])
    return Sound(finished(rng, samples), kind, spans=((start, start + seconds),))


class Speech:
    """Recordings of every word in many voices, made once and kept in a folder."""

    def __init__(self, folder: Path, per_word: int, seed: int) -> None:
        file = folder / f"speech-{per_word}-{seed}.npz"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(file, **self._record(per_word, seed))  # type: ignore[arg-type]
        with np.load(file) as stored:
            self._clips: dict[str, list[NDArray[np.int16]]] = {word: [] for word in SPOKEN}
            for name in stored.files:
                self._clips[name.split("-")[0]].append(stored[name])

    def _record(self, per_word: int, seed: int) -> dict[str, NDArray[np.int16]]:
        rng = random.Random(seed)
        jobs = {
            f"{word}-{index}": (
                word,
                rng.choice(VOICES) + rng.choice(VARIANTS),
                rng.randrange(100, 220),
                rng.randrange(15, 86),
            )
            for word in SPOKEN
            for index in range(per_word)
        }
        voice = Voice()
        return {name: speak(voice, *job) for name, job in jobs.items()}

    def make(self, rng: random.Random, word: str = "") -> Sound:
        word = word or rng.choice(SPOKEN)
        clip = rng.choice(self._clips[word]).astype(np.float64) / 32768
        if rng.random() < 0.5:  # a little faster or slower, higher or lower
            factor = rng.uniform(0.92, 1.09)
            clip = np.interp(np.arange(0, len(clip) - 1, factor), np.arange(len(clip)), clip)
        start = rng.uniform(0.0, 0.5)
        samples = np.concatenate([silence(start), clip, silence(rng.uniform(0.0, 0.4))])
        return Sound(finished(rng, samples), "speech", word=word, spans=((start, start + len(clip) / RATE),))


def speak(voice: Voice, word: str, name: str, words_per_minute: int, pitch: int) -> NDArray[np.int16]:
    """One word in the voice of that name, silence cut off at both ends."""
    import soxr

    data = soxr.resample(voice.speak(word, name, words_per_minute, pitch).astype(np.float32), voice.rate, RATE)
    loud = np.flatnonzero(np.abs(data) > 300)
    data = data[max(0, loud[0] - 400) : loud[-1] + 400]
    return np.clip(data, -32768, 32767).astype(np.int16)


def wav(samples: Sequence[float] | Samples) -> bytes:
    """16-bit wav file."""
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()
