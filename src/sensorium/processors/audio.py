"""Log-mel features in numpy: as Whisper's encoders eat them, and as Google's.

Sources: Radford et al. 2022 (Whisper), section 2.2, with Slaney's mel scale and area normalisation; the maximum for the
dynamic range is taken over the whole clip. transformers' Gemma4AudioFeatureExtractor, with HTK's mel scale.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000  # Hz
FFT_SAMPLES = 400
HOP_SAMPLES = 160
FREQUENCIES = FFT_SAMPLES // 2 + 1
DYNAMIC_RANGE = 8.0  # log10 units kept below the clip's loudest bin
FRAMES_AT_ONCE = 3000  # bounds the memory of one transform
SHORT_FRAME = 320  # samples of Google's frames,
SHORT_FFT = 512  # which are transformed with zeros behind them

_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # Slaney: linear below, logarithmic above
_LOG_STEP = np.log(6.4) / 27.0


def _mel_of(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = hz * _BREAK_MEL / _BREAK_HZ
    return np.where(hz < _BREAK_HZ, linear, _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP)


def _hz_of(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mel * _BREAK_HZ / _BREAK_MEL
    return np.where(mel < _BREAK_MEL, linear, _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL)))


def _triangles(edges: NDArray[np.float64], frequencies: int) -> NDArray[np.float64]:
    """Filters that rise from each edge to the next and fall to the one after it: [frequencies, len(edges) - 2]."""
    hz = np.linspace(0.0, SAMPLE_RATE / 2, frequencies)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hz - left) / (centre - left), (right - hz) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


@functools.cache
def mel_filters(num_bins: int) -> NDArray[np.float64]:
    """Triangular filters over 0..8 kHz, each of unit area: [FREQUENCIES, num_bins]."""
    edges = _hz_of(np.linspace(0.0, float(_mel_of(np.array(SAMPLE_RATE / 2))), num_bins + 2))  # [num_bins + 2]
    return _triangles(edges, FREQUENCIES) * (2.0 / (edges[2:] - edges[:-2]))


def _htk_filters(num_bins: int) -> NDArray[np.float64]:
    """The same by HTK's scale, each as high as the others: [SHORT_FFT / 2 + 1, num_bins]."""
    mel = np.linspace(0.0, 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0), num_bins + 2)
    return _triangles(700.0 * (10.0 ** (mel / 2595.0) - 1.0), SHORT_FFT // 2 + 1)


@functools.cache
def _bands(
    scale: Literal["slaney", "htk"], num_bins: int
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.intp]]:
    """The filters' weights that are not zero, filter by filter: (frequency, weight [.., 1], where each filter starts).

    A product with these 400 of 25,000 weights is as fast as one with the matrix, and needs none of BLAS's threads,
    which wait for each other for tens of milliseconds where other processes compute.
    """
    filters = mel_filters(num_bins) if scale == "slaney" else _htk_filters(num_bins)
    used = filters > 0
    used[0] |= ~used.any(axis=0)  # narrow filters between two frequencies: one weight, 0
    bins, frequencies = np.nonzero(used.T)
    return frequencies, filters[frequencies, bins][:, None], np.searchsorted(bins, np.arange(num_bins))


@functools.cache
def _window(size: int = FFT_SAMPLES) -> NDArray[np.float64]:
    """Periodic Hann."""
    return np.hanning(size + 1)[:-1]


def log_mel(samples: NDArray[np.float32], num_bins: int) -> NDArray[np.float32]:
    """Mono 16 kHz samples [n] -> [num_bins, n // HOP_SAMPLES]. `n` must be more than FFT_SAMPLES / 2."""
    if len(samples) <= FFT_SAMPLES // 2:
        raise ValueError(f"a clip needs more than {FFT_SAMPLES // 2} samples")
    (frequencies, weights, starts), window = _bands("slaney", num_bins), _window()
    count = len(samples) // HOP_SAMPLES
    out = np.empty((num_bins, count), np.float32)
    for start in range(0, count, FRAMES_AT_ONCE):
        last = min(start + FRAMES_AT_ONCE, count) - 1
        heard = _reflected(samples, start * HOP_SAMPLES, last * HOP_SAMPLES + FFT_SAMPLES)
        frames = np.lib.stride_tricks.sliding_window_view(heard, FFT_SAMPLES)[::HOP_SAMPLES]
        # Rounded to complex64 because the published features are: near silence the rounding is all there is.
        piece = np.fft.rfft(frames * window).astype(np.complex64)
        power = (np.square(piece.real, dtype=np.float64) + np.square(piece.imag, dtype=np.float64)).T
        mel = np.add.reduceat(power[frequencies] * weights, starts, axis=0)  # [num_bins, frames]
        out[:, start : last + 1] = np.log10(np.maximum(mel, 1e-10))
    np.maximum(out, out.max(initial=-10.0) - DYNAMIC_RANGE, out=out)
    out += 4.0
    out /= 4.0
    return out


def _reflected(samples: NDArray[np.float32], first: int, last: int) -> NDArray[np.float32]:
    """Samples [first, last) of a clip with half a transform of itself, backwards, before and behind it: of an hour no
    second copy is made."""
    half, size = FFT_SAMPLES // 2, len(samples)
    before, behind = samples[half:0:-1], samples[-2 : -half - 2 : -1]
    within = samples[max(first - half, 0) : max(last - half, 0)]
    return np.concatenate(
        [before[first:last], within, behind[max(first - half - size, 0) : max(last - half - size, 0)]]
    )


def short_frames(samples: int) -> int:
    """Frames of `log_magnitude_mel`: those whose samples, and one more, are all there."""
    return max((samples + SHORT_FRAME // 2 - SHORT_FRAME - 1) // HOP_SAMPLES + 1, 0)


def log_magnitude_mel(samples: NDArray[np.float32], num_bins: int, floor: float) -> NDArray[np.float32]:
    """Mono 16 kHz samples [n] -> log(mel of magnitudes + floor) [short_frames(n), num_bins]; the first frame is half
    of silence."""
    padded = np.pad(samples, (SHORT_FRAME // 2, 0))
    frames = np.lib.stride_tricks.sliding_window_view(padded, SHORT_FRAME)[::HOP_SAMPLES][: short_frames(len(samples))]
    (frequencies, weights, starts), window = _bands("htk", num_bins), _window(SHORT_FRAME).astype(np.float32)
    out = np.empty((len(frames), num_bins), np.float32)
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        magnitudes = np.abs(np.fft.rfft(frames[start : start + FRAMES_AT_ONCE] * window, SHORT_FFT)).T
        mel = np.add.reduceat(magnitudes[frequencies] * weights, starts, axis=0)  # [num_bins, frames]
        out[start : start + mel.shape[1]] = np.log(mel + floor).T
    return out
