"""Phi-3.5-vision and VLM2Vec against CLIP and Phi-3 of transformers, joined here as the published code joins them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import checkpoints
from support.engine_harness import bench
from support.image_families import CLIP, noise, record, word_tokenizer
from support.model_driver import Driver
from support.model_driver import Sequence as Running
from torch.nn import functional

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES
from sensorium.errors import CheckpointError, MediaError, RequestError
from sensorium.models.loading import load_model
from sensorium.models.phi3_v import Phi3V
from sensorium.processors.phi3_v import Phi3VProcessor
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, MediaFeatures, MediaItem, PoolingParams, Prompt, SamplingParams

FILE = {**CLIP, "num_crops": 4}
TOKENS = {"<s>": 1, "<|image|>": 32044, "<|user|>": 32010}
SIZES = [(50, 70), (200, 60), (56, 56)]


# What the published code computes, written down once more.


def oracle_canvas(picture: np.ndarray, num_crops: int, tile: int) -> np.ndarray:
    """uint8 [height, width, 3] -> the padded picture."""
    one = Image.fromarray(picture)
    turned = one.width < one.height
    if turned:
        one = one.transpose(Image.Transpose.TRANSPOSE)
    ratio = one.width / one.height
    scale = max(s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops)
    one = one.resize((scale * tile, int(scale * tile / ratio)), Image.Resampling.BILINEAR)
    high = math.ceil(one.height / tile) * tile
    sheet = Image.new("RGB", (one.width, high), (255, 255, 255))
    sheet.paste(one, (0, int((high - one.height) / 2)))
    return np.array(sheet.transpose(Image.Transpose.TRANSPOSE) if turned else sheet)


def oracle_tiles(picture: np.ndarray, num_crops: int, tile: int) -> tuple[torch.Tensor, tuple[int, int]]:
    pixels = torch.from_numpy(oracle_canvas(picture, num_crops, tile)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(CLIP[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (pixels - mean) / std
    whole = functional.interpolate(pixels[None], size=(tile, tile), mode="bicubic")
    high, wide = pixels.shape[1] // tile, pixels.shape[2] // tile
    crops = [pixels[:, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] for i in range(high) for j in range(wide)]
    return torch.cat([whole, torch.stack(crops)]), (high, wide)


def oracle_rows(
    parts: checkpoints.Parts, picture: np.ndarray, *, num_crops: int = 4, tile: int = 56, order: str = "sub_glb"
) -> torch.Tensor:
    tiles, (high, wide) = oracle_tiles(picture, num_crops, tile)
    with torch.inference_mode():
        states = parts.vision(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]
    side = tile // 14
    own = parts.own
    newline, between = own["sub_GN"].flatten(), own["glb_GN"].flatten()

    def lines(plane: torch.Tensor) -> list[torch.Tensor]:
        """[height, width, hidden] of patches -> rows of 2 x 2 patches, a newline after every line."""
        out = []
        for i in range(0, plane.shape[0], 2):
            for j in range(0, plane.shape[1], 2):
                out.append(torch.cat([plane[i, j], plane[i, j + 1], plane[i + 1, j], plane[i + 1, j + 1]]))
            out.append(newline)
        return out

    planes = states.view(len(tiles), side, side, -1)
    sub = torch.cat([torch.cat([planes[1 + i * wide + j] for j in range(wide)], dim=1) for i in range(high)])
    halves = (lines(sub), lines(planes[0])) if order == "sub_glb" else (lines(planes[0]), lines(sub))
    rows = torch.stack([*halves[0], between, *halves[1]])
    hidden = functional.gelu(functional.linear(rows, own["img_projection.0.weight"], own["img_projection.0.bias"]))
    return functional.linear(hidden, own["img_projection.2.weight"], own["img_projection.2.bias"])


def oracle_embeddings(parts: checkpoints.Parts, prompt: Prompt, pictures: Sequence[MediaItem]) -> torch.Tensor:
    with torch.inference_mode():
        rows = parts.text.get_input_embeddings()(torch.from_numpy(prompt.token_ids).long())
        for span in prompt.spans:
            rows[span.offset : span.offset + span.length] = oracle_rows(parts, pictures[span.item].data)
    return rows


def oracle_greedy(parts: checkpoints.Parts, embeddings: torch.Tensor, count: int) -> list[int]:
    """Without a cache: crossing the border of LongRoPE turns all positions' frequencies."""
    out: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            token = parts.text(inputs_embeds=embeddings[None], use_cache=False).logits[0, -1].argmax()
            out.append(int(token))
            embeddings = torch.cat([embeddings, parts.text.get_input_embeddings()(token[None])])
    return out


@dataclass
class Served:
    parts: checkpoints.Parts
    model: Phi3V
    processor: Phi3VProcessor

    def encode(self, media: Sequence[MediaFeatures]) -> list[torch.Tensor]:
        items = [{name: torch.from_numpy(array) for name, array in one.arrays.items()} for one in media]
        with torch.inference_mode():
            return self.model.encode("image", items)

    def prompt(
        self, pictures: Sequence[MediaItem], text: str = "<|user|>\n{}What is shown?<|end|>\n<|assistant|>\n"
    ) -> Prompt:
        marks = "".join(f"{self.processor.placeholder('image', i)}\n" for i in range(len(pictures)))
        media = [self.processor.process(picture) for picture in pictures]
        return self.processor.build(text.format(marks), media, add_special_tokens=True)

    def run(self, prompt: Prompt) -> Running:
        ids = torch.from_numpy(prompt.token_ids).long()
        rows = self.model.embed(ids).clone()
        encoded = self.encode(prompt.media) if prompt.media else []
        for span in prompt.spans:
            rows[span.offset : span.offset + span.length] = encoded[span.item]
        return Running(ids.tolist(), rows=rows)


def load(folder: Path, parts: checkpoints.Parts) -> Served:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert isinstance(model, Phi3V)
    return Served(parts, model, Phi3VProcessor(checkpoint, Tokenizer.from_folder(folder)))


@pytest.fixture(scope="module", name="here")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("phi3_v")
    return load(folder, checkpoints.make_phi3_v(folder))


def pictures(count: int = 3) -> list[MediaItem]:
    return [noise(*SIZES[i % len(SIZES)], seed=i) for i in range(count)]


def processor(**overrides: Any) -> Phi3VProcessor:
    return Phi3VProcessor(record({}, FILE), word_tokenizer(TOKENS), overrides)


# Counts and pixels.


@pytest.mark.parametrize(
    ("crops", "height", "width", "grid", "tokens"),
    [
        (4, 336, 336, (2, 2), 757),
        (4, 480, 640, (2, 2), 757),
        (4, 1200, 300, (4, 1), 781),
        (4, 300, 1200, (1, 4), 745),
        (16, 336, 336, (4, 4), 2509),
        (16, 480, 640, (3, 4), 1921),
        (16, 640, 480, (4, 3), 1933),
    ],
)
def test_golden(crops: int, height: int, width: int, grid: tuple[int, int], tokens: int) -> None:
    here = processor(num_crops=crops)
    assert here.num_tokens("image", height, width) == tokens
    features = here.process(noise(height, width))
    assert features.num_rows == tokens
    assert tuple(features.arrays["grid"]) == grid
    assert len(features.arrays["pixels"]) == 1 + grid[0] * grid[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 17))
def test_pixels(height: int, width: int, crops: int) -> None:
    config = {"img_processor": {"vision_config": {"image_size": 28, "patch_size": 14}}}
    here = Phi3VProcessor(record(config, FILE), word_tokenizer(TOKENS), {"num_crops": crops})
    item = noise(height, width)
    if 28 * max(s for s in range(1, 18) if s * math.ceil(s * min(height, width) / max(height, width)) <= crops) * min(
        height, width
    ) < max(height, width):
        with pytest.raises(MediaError, match="too narrow"):
            here.process(item)
        return
    tiles, grid = oracle_tiles(item.data, crops, 28)
    features = here.process(item)
    assert tuple(features.arrays["grid"]) == grid
    np.testing.assert_allclose(features.arrays["pixels"], tiles.numpy(), atol=3e-6)
    assert features.num_rows == here.num_tokens("image", height, width)


def test_real_tiles() -> None:
    for size in [(336, 336), (480, 640), (1000, 200)]:
        item = noise(*size)
        tiles, _ = oracle_tiles(item.data, 4, 336)
        np.testing.assert_allclose(processor().process(item).arrays["pixels"], tiles.numpy(), atol=3e-6)


def test_too_narrow_pictures_are_refused() -> None:
    with pytest.raises(MediaError, match="too narrow") as refused:
        processor(num_crops=1).process(noise(1, 400))
    assert (refused.value.code, refused.value.param) == ("image_too_small", "messages[0]")


def test_num_crops_of_file_operator_and_request() -> None:
    assert Phi3VProcessor(record({}, CLIP), word_tokenizer(TOKENS)).num_tokens("image", 300, 300) == 2 * 144 + 1 + 24
    here = processor()
    assert here.with_overrides({"num_crops": 16}).num_tokens("image", 336, 336) == 2509
    assert here.num_tokens("image", 336, 336) == 757
    assert here.with_overrides({"num_crops": 16}).process(noise(9, 9)).key != here.process(noise(9, 9)).key
    with pytest.raises(RequestError, match="'num_crops' must be an integer from 1 to 64"):
        here.with_overrides({"num_crops": 0})


# Prompts.


def test_every_piece_of_text_begins_anew() -> None:
    here = processor()
    one = here.process(noise(336, 336))
    prompt = here.build("<|user|>\n<|image_1|>\nHi", [one], add_special_tokens=True)
    assert prompt.token_ids.tolist() == [1, 32010, 10, *[32044] * 757, 1, 10, *map(ord, "Hi")]
    assert [(s.item, s.offset, s.length, s.row) for s in prompt.spans] == [(0, 3, 757, 0)]
    begin = here.build("<s><|image_1|>", [one])
    assert begin.token_ids.tolist() == [1, *[32044] * 757, 1]


def test_the_number_selects_the_picture() -> None:
    here = processor(num_crops=1)
    square, wide = here.process(noise(30, 30)), here.with_overrides({"num_crops": 4}).process(noise(30, 60))
    prompt = here.build("<|image_2|><|image_1|>x<|image_2|>", [square, wide])
    assert [(s.item, s.length) for s in prompt.spans] == [(1, wide.num_rows), (0, square.num_rows), (1, wide.num_rows)]
    assert prompt.media == (square, wide)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<|image_1|>", 0),
        ("none", 1),
        ("<|image_2|>", 1),
        ("<|image_1|><|image_3|>", 2),
        ("<|image_0|>", 1),
        ("<|image_1|>", 2),
    ],
)
def test_numbers_and_pictures_must_agree(text: str, count: int) -> None:
    here = processor(num_crops=1)
    with pytest.raises(RequestError, match=rf"brings {count} image") as refused:
        here.build(text, [here.process(noise(20, 20))] * count)
    assert refused.value.code == "media_count_mismatch"


def test_no_placeholder_comes_from_foreign_text(here: Served) -> None:
    tokenizer = here.processor.tokenizer.with_literals(here.processor.literals)
    for typed in ("<|image_1|>", "<|image_77|>", "<|image|>"):
        prompt = here.processor.build(f"look {tokenizer.escape(typed)}", [], add_special_tokens=True)
        assert not prompt.spans
        assert tokenizer.decode(prompt.token_ids.tolist()[1:], skip_special_tokens=False) == f"look {typed}"


def test_pieces_equal_the_published_processor(here: Served) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(here.model.checkpoint.folder)
    prompt = here.prompt(pictures(2))
    expected: list[int] = []
    for index, text in enumerate(["<|user|>\n", "\n", "\nWhat is shown?<|end|>\n<|assistant|>\n"]):
        expected += theirs(text).input_ids
        if index < 2:
            expected += [here.processor.placeholder_id("image")] * prompt.media[index].num_rows
    assert prompt.token_ids.tolist() == expected


# Numbers.


def test_rows_equal_the_composition(here: Served) -> None:
    items = pictures()
    media = [here.processor.process(item) for item in items]
    for ours, item, one in zip(here.encode(media), items, media, strict=True):
        assert len(ours) == one.num_rows
        torch.testing.assert_close(ours, oracle_rows(here.parts, item.data), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(here.encode([one])[0], ours, atol=1e-5, rtol=1e-5)
    assert len({rows.untyped_storage().data_ptr() for rows in here.encode(media)}) == len(media)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_logits_and_greedy_tokens_below_and_above_the_long_border(here: Served, count: int) -> None:
    items = pictures(count)
    prompt = here.prompt(items)
    border = here.model.long_context_from
    assert border is not None
    assert (len(prompt.token_ids) + 32 <= border) if count < 2 else len(prompt.token_ids) > border
    embeddings = oracle_embeddings(here.parts, prompt, items)
    with torch.inference_mode():
        theirs = here.parts.text(inputs_embeds=embeddings[None]).logits[0]
    torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt)), theirs, atol=1e-4, rtol=0)
    ours = Driver(here.model).greedy([here.run(prompt)], 32)[0]
    assert ours == oracle_greedy(here.parts, embeddings, 32)
    assert len(set(ours)) > 4, "a model that runs in circles shows nothing"


def test_answers_that_grow_over_the_long_border_are_computed_anew(here: Served) -> None:
    items = pictures(3)
    prompt = here.prompt(items)
    border = here.model.long_context_from
    assert border is not None and len(prompt.token_ids) + 4 < border < len(prompt.token_ids) + 40
    sampling = SamplingParams(max_tokens=48, temperature=0.0)
    requests = [EngineRequest(i, prompt, sampling) for i in range(2)]
    for result in bench(here.model, max_num_batched_tokens=50, max_model_len=1024).run(*requests):
        assert result.tokens == oracle_greedy(here.parts, oracle_embeddings(here.parts, prompt, items), 48)


def test_prefill_cut_everywhere_inside_pictures(here: Served) -> None:
    prompt = here.prompt(pictures(2))
    driver = Driver(here.model, num_blocks=8192)
    whole = driver.prefill(here.run(prompt))
    for place in sorted({place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)}):
        torch.testing.assert_close(driver.prefill(here.run(prompt), place), whole, atol=1e-4, rtol=0)


def test_unequal_requests_together_equal_one_by_one(here: Served) -> None:
    every = [noise(*size, seed=7 + i) for i, size in enumerate(SIZES * 2)]
    prompts = [here.prompt(every[i : i + i % 4], text="{}" + "word " * i + "?") for i in range(6)]
    alone = [Driver(here.model).greedy([here.run(prompt)], 12)[0] for prompt in prompts]
    together = Driver(here.model, num_blocks=1024).greedy([here.run(prompt) for prompt in prompts], 12)
    assert together == alone


def test_vlm2vec_is_the_last_state_normalised(here: Served) -> None:
    items = pictures(1)
    prompt = here.prompt(items, text="{}Represent the given image.")
    with torch.inference_mode():
        states = here.parts.text.model(inputs_embeds=oracle_embeddings(here.parts, prompt, items)[None])
    theirs = functional.normalize(states.last_hidden_state[0, -1], dim=-1)
    requests = [EngineRequest(i, prompt, pooling=PoolingParams("embed")) for i in range(2)]
    for result in bench(here.model, max_num_batched_tokens=20).run(*requests):
        np.testing.assert_allclose(result.vector, theirs, atol=1e-5)


def test_bfloat16_rows_are_close(here: Served) -> None:
    model = load_model(here.model.checkpoint, dtype=torch.bfloat16, device="cpu")
    media = [here.processor.process(item) for item in pictures()]
    items = [{name: torch.from_numpy(array) for name, array in one.arrays.items()} for one in media]
    with torch.inference_mode():
        for ours, expected in zip(model.encode("image", items), here.encode(media), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.float() - expected).norm() < 0.03 * expected.norm()


# Checkpoints.


@pytest.mark.parametrize("options", [{"shards": 2}, {"pickled": True}, {"dtype": "bfloat16"}], ids=str)
def test_files(options: dict[str, Any], tmp_path: Path) -> None:
    here = load(tmp_path, checkpoints.make_phi3_v(tmp_path, **options))
    item = pictures(1)[0]
    ours = here.encode([here.processor.process(item)])[0]
    torch.testing.assert_close(ours, oracle_rows(here.parts, item.data), atol=1e-5, rtol=1e-4)


def test_dialects_of_the_tower(tmp_path: Path) -> None:
    parts = checkpoints.make_phi3_v(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    prefix = "model.vision_embed_tokens"
    tensors = {
        key.replace("img_processor.vision_model.", "img_processor."): value
        for key, value in tensors.items()
        if ".layers.2." not in key and "post_layernorm" not in key
    }
    tensors[f"{prefix}.wte.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}.img_processor.embeddings.position_ids"] = torch.arange(17)
    checkpoints.write_weights(tmp_path, tensors)
    here = load(tmp_path, parts)
    item = pictures(1)[0]
    ours = here.encode([here.processor.process(item)])[0]
    torch.testing.assert_close(ours, oracle_rows(parts, item.data), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tower_that_is_not_described(pickled: bool, tmp_path: Path) -> None:
    vision = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    here = load(tmp_path, checkpoints.make_phi3_v(tmp_path, describes_tower=False, vision=vision, pickled=pickled))
    item = noise(100, 90)
    media = here.processor.with_overrides({"num_crops": 1}).process(item)
    assert media.num_rows == 2 * 144 + 1 + 24
    expected = oracle_rows(here.parts, item.data, num_crops=1, tile=336)
    torch.testing.assert_close(here.encode([media])[0], expected, atol=1e-5, rtol=1e-4)


def test_order_of_the_halves(tmp_path: Path) -> None:
    parts = checkpoints.make_phi3_v(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["embd_layer"]["hd_transform_order"] = "glb_sub"
    (tmp_path / "config.json").write_text(json.dumps(config))
    item = pictures(1)[0]
    here = load(tmp_path, parts)
    ours = here.encode([here.processor.process(item)])[0]
    torch.testing.assert_close(ours, oracle_rows(parts, item.data, order="glb_sub"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("embd_layer", {"projection_cls": "linear"}, "embd_layer.projection_cls 'linear' is not supported"),
        ("embd_layer", {"with_learnable_separator": False}, "with_learnable_separator False is not supported"),
        ("img_processor", {"type_feature": "cls_patch"}, "img_processor.type_feature 'cls_patch' is not supported"),
        ("img_processor", {"vision_config": None}, "takes images of 56 pixels instead of 336"),
    ],
)
def test_unsupported_configurations(part: str, change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    checkpoints.make_phi3_v(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[part].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    checkpoints.make_phi3_v(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    key = "model.vision_embed_tokens.glb_GN"
    checkpoints.write_weights(tmp_path, {name: value for name, value in tensors.items() if name != key})
    with pytest.raises(CheckpointError, match=r"missing vision_embed_tokens\.glb_GN"):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_stop_tokens(tmp_path: Path) -> None:
    checkpoints.make_phi3_v(tmp_path)
    checkpoint, tokenizer = open_checkpoint(tmp_path), Tokenizer.from_folder(tmp_path)
    ends = ("</s>", "<|endoftext|>", "<|end|>")
    assert set(checkpoint.stop_token_ids) == {tokenizer.token_to_id(name) for name in ends}


def test_its_own_chat_template(here: Served) -> None:
    tokenizer = here.processor.tokenizer.with_literals(here.processor.literals, special=True)
    template = LocalTemplate(
        FAMILIES["Phi3VForCausalLM"].chat_template or "",
        tokenizer,
        modalities=here.processor.modalities,
        placeholder=here.processor.placeholder,
    )
    forged = TextPart("as in <|image_2|>")
    text = template.render(
        [
            Message("system", (forged,)),
            Message("user", (MediaPart("image"), TextPart("What?"))),
            Message("assistant", (forged,)),
            Message("user", (TextPart("And"), MediaPart("image"))),
        ]
    )
    assert tokenizer.unescape(text) == (
        "<|system|>\nas in <|image_2|><|end|>\n<|user|>\n<|image_1|>\nWhat?<|end|>\n"
        "<|assistant|>\nas in <|image_2|><|end|>\n<|user|>\nAnd\n<|image_2|><|end|>\n<|assistant|>\n"
    )
    media = [here.processor.process(item) for item in pictures(2)]
    assert [span.item for span in here.processor.build(text, media).spans] == [0, 1]


def test_length_of_the_text_before_pictures_are_decoded(here: Served) -> None:
    text = "<|user|>\n<|image_1|>\nand <|image_2|>"
    prompt = here.processor.build(text, [here.processor.process(item) for item in pictures(2)], add_special_tokens=True)
    rows = sum(span.length for span in prompt.spans)
    assert here.processor.text_length(text) == len(prompt.token_ids) - rows - 3, "all but the beginning of each piece"


def test_a_picture_that_stands_twice_in_the_prompt(here: Served) -> None:
    items = pictures(2)
    media = [here.processor.process(item) for item in items]
    prompt = here.processor.build("<|user|>\n<|image_2|>as<|image_1|>or<|image_2|>", media, add_special_tokens=True)
    request = EngineRequest(1, prompt, SamplingParams(max_tokens=12, temperature=0.0))
    [result] = bench(here.model, max_num_batched_tokens=16).run(request)
    assert result.tokens == oracle_greedy(here.parts, oracle_embeddings(here.parts, prompt, items), 12)
