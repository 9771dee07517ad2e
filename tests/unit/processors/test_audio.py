"""Log-mel features against transformers' numpy path and its WhisperFeatureExtractor."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function

from sensorium.processors.audio import FRAMES_AT_ONCE, HOP_SAMPLES, log_mel, mel_filters


@pytest.mark.parametrize("num_bins", [80, 128])
@pytest.mark.parametrize("num_samples", [320, 1600, 16_001, 48_160, (FRAMES_AT_ONCE + 7) * HOP_SAMPLES])
def test_equals_the_published_features(num_bins: int, num_samples: int) -> None:
    samples = (np.random.default_rng(num_samples).standard_normal(num_samples) * 0.1).astype(np.float32)
    extractor = WhisperFeatureExtractor(feature_size=num_bins)
    reference = spectrogram(
        samples,
        window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        power=2.0,
        mel_filters=extractor.mel_filters,
        log_mel="log10",
    )[:, : num_samples // HOP_SAMPLES]
    reference = (np.maximum(reference, reference.max() - 8.0) + 4.0) / 4.0
    features = log_mel(samples, num_bins)
    assert features.shape == (num_bins, num_samples // HOP_SAMPLES)
    np.testing.assert_allclose(features, reference, atol=1e-6)
    torch_path = extractor(samples, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="np")
    np.testing.assert_allclose(features, torch_path.input_features[0][:, : features.shape[1]], atol=1e-4)


def test_filters_equal_the_published_ones() -> None:
    np.testing.assert_allclose(mel_filters(128), WhisperFeatureExtractor(feature_size=128).mel_filters, atol=1e-12)


def test_silence_and_too_short_clips() -> None:
    assert np.all(log_mel(np.zeros(1600, np.float32), 80) == np.float32(-1.5))
    with pytest.raises(ValueError, match="more than 200 samples"):
        log_mel(np.zeros(200, np.float32), 80)


@pytest.mark.parametrize("samples", [201, 399, 560, 1120, 1279, 5000])
def test_pieces_of_a_transform_do_not_show(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a piece begins or ends, the clip's own samples stand beside it; only its ends are reflected."""
    clip = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    whole = log_mel(clip, 80)
    for frames in (1, 2, 7):
        monkeypatch.setattr("sensorium.processors.audio.FRAMES_AT_ONCE", frames)
        np.testing.assert_array_equal(log_mel(clip, 80), whole)
