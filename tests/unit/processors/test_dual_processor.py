"""CLIP's and SigLIP's processor: the reference's pixels, one token per image, a text or one image."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from support.image_families import CLIP, noise, normalised, pixels_of, record, word_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.processors.dual import DualProcessor, NaflexProcessor, canonical
from sensorium.types import MediaFeatures

CLIP_FILE = {**CLIP, "image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 224, "resample": 3}
SIGLIP_FILE = {
    **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "SiglipImageProcessor"},
    **{"size": {"height": 224, "width": 224}, "resample": 3},
}
GOLDEN = {  # width and height -> sums of SigLIP's and of CLIP's pixels
    (16, 16): (-3138.107, 22267.536),
    (640, 480): (-107.36, 28003.463),
    (1200, 300): (-79.29, 28289.037),
}


def processor(
    kind: str, file: dict[str, Any] | None = None, side: int = 224, tokenizer: str = "", **overrides: Any
) -> DualProcessor:
    stated = record({"vision_config": {"model_type": f"{kind}_vision_model", "image_size": side}}, file or {})
    stated = dataclasses.replace(stated, tokenizer_config={"tokenizer_class": tokenizer})
    return DualProcessor(stated, word_tokenizer({"<s>": 1}), overrides)


@pytest.mark.parametrize("size", GOLDEN)
def test_pixels(size: tuple[int, int]) -> None:
    width, height = size
    for kind, file, oracle, expected in (
        ("siglip", SIGLIP_FILE, SiglipImageProcessorPil(), GOLDEN[size][0]),
        ("clip", CLIP_FILE, CLIPImageProcessorPil(), GOLDEN[size][1]),
    ):
        item = noise(height, width)
        for stated in (file, None):  # a folder without the file means its class's own numbers
            features = processor(kind, stated).process(item)
            assert features.num_rows == processor(kind, stated).num_tokens("image", height, width) == 1
            theirs = np.asarray(oracle(item.data, input_data_format="channels_last")["pixel_values"][0])
            np.testing.assert_allclose(pixels_of(features), theirs, atol=1e-6)
            assert features.arrays["pixels"].sum(dtype=np.float64) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("width", "height", "grid", "total"),
    [
        (16, 16, (16, 16), -4124.984),
        (336, 336, (16, 16), -350.567),
        (640, 480, (14, 18), -121.163),
        (2000, 50, (3, 85), -456.081),
        (333, 777, (24, 10), -197.783),
        (1280, 720, (12, 21), -58.386),
    ],
)
def test_naflex(width: int, height: int, grid: tuple[int, int], total: float) -> None:
    """Golden grids and sums; pixels as transformers has them."""
    item = noise(height, width)
    naflex = NaflexProcessor(record({"vision_config": {}}, {}), word_tokenizer({"<s>": 1}))
    made = naflex.process(item)
    assert (made.num_rows, made.arrays["grids"].tolist()) == (1, [list(grid)])
    ours = normalised(made.arrays)
    assert ours.sum(dtype=np.float64) == pytest.approx(total, abs=0.1)
    theirs = Siglip2ImageProcessorPil()(item.data, input_data_format="channels_last")["pixel_values"][0]
    ours = ours.reshape(len(ours), 3, -1).transpose(0, 2, 1).reshape(len(ours), -1)
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-6)
    few = naflex.with_overrides({"max_num_patches": 64}).process(item)
    assert few.arrays["grids"].prod() <= 64


def test_a_prompt_is_a_text_or_one_image() -> None:
    clip = processor("clip")
    media: list[MediaFeatures] = [clip.process(noise(20, 30, seed=seed)) for seed in range(2)]
    assert clip.build("ab", [], add_special_tokens=True).token_ids.tolist() == [1, 97, 98]
    prompt = clip.build(" <image>\n", media[:1], add_special_tokens=True)
    assert prompt.token_ids.tolist() == [64064]  # behind the vocabulary
    assert [(span.item, span.offset, span.length) for span in prompt.spans] == [(0, 0, 1)]
    assert clip.text_length("ab<image>") == 2
    for text, given, code in (
        ("<image>a cat", media[:1], "one_input"),
        ("<image><image>", media, "one_input"),
        ("<image>", media, "media_count_mismatch"),
        ("", media[:1], "media_count_mismatch"),
    ):
        with pytest.raises(RequestError) as caught:
            clip.build(text, given, add_special_tokens=True)
        assert caught.value.code == code


def test_texts_of_the_first_siglip_are_made_plain() -> None:
    """As transformers' tokenizer does in code: neither lower case nor punctuation stand in its files."""
    text = "A  Photo of\ta CAT, {not} a dog!\u00a0\u2014 'Ünter'"
    assert canonical(text) == "a photo of a cat not a dog \u2014 ünter"
    assert processor("siglip", tokenizer="SiglipTokenizer").cleaned("A, b!") == "a b"
    assert processor("clip", tokenizer="CLIPTokenizer").cleaned("A, b!") == "A, b!"
    build = processor("siglip", tokenizer="SiglipTokenizerFast").build
    assert build("A,", [], add_special_tokens=True).token_ids.tolist() == [1, 97]


def test_texts_of_siglip_2_are_lowered() -> None:
    """As transformers' own tokenizer of it does, whatever class the files name."""
    texts = ["A CAT, in Paris!", "\u039f\u0394\u039f\u03a3 \u0130", "<EOS> Not the end"]
    raw = Siglip2Tokenizer().backend_tokenizer.normalizer
    naflex = NaflexProcessor(record({"vision_config": {}}, {}), word_tokenizer({"<s>": 1}))
    fixed = [
        processor("siglip", tokenizer=name) for name in ("GemmaTokenizerFast", "GemmaTokenizer", "Siglip2Tokenizer")
    ]
    for text in texts:
        expected = raw.normalize_str(text).replace("\u2581", " ")
        assert expected != text
        assert [one.cleaned(text) for one in (naflex, *fixed)] == [expected] * 4
    assert fixed[0].build("AB", [], add_special_tokens=True).token_ids.tolist() == [1, 97, 98]


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(CheckpointError, match="vision tower 'dinov2'"):
        DualProcessor(record({"vision_config": {"model_type": "dinov2"}}, {}), word_tokenizer({"<s>": 1}))
    with pytest.raises(CheckpointError, match="384"):
        processor("siglip", {**SIGLIP_FILE, "size": {"height": 384, "width": 384}})
    with pytest.raises(StartupError, match="do_pad"):
        processor("clip", do_pad=True)
