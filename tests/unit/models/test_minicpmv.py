"""MiniCPM-V 2.6 against Idefics2's tower, torch's attention and Qwen2, joined here as the published code joins them."""

from __future__ import annotations

import dataclasses
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
from support.image_families import noise, record, word_tokenizer
from support.model_driver import Driver
from support.model_driver import Sequence as Running
from torch.nn import functional

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.checkpoint.families import FAMILIES
from sensorium.errors import CheckpointError, RequestError, StartupError
from sensorium.models.loading import load_model
from sensorium.models.minicpmv import MiniCPMV
from sensorium.models.towers.siglip import PositionTable
from sensorium.processors.minicpmv import TOKENS, MiniCPMVProcessor, slicing
from sensorium.prompt.local import LocalTemplate
from sensorium.prompt.messages import MediaPart, Message, TextPart
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import EngineRequest, MediaFeatures, MediaItem, Modality, Prompt, SamplingParams

IDS = {
    "<s>": 1,
    "<unk>": 128244,
    "<image>": 151646,
    "</image>": 151647,
    "<slice>": 151656,
    "</slice>": 151657,
    "<image_id>": 151658,
    "</image_id>": 151659,
}
SIZES = [(50, 70), (120, 60), (56, 56), (30, 200)]


# What the published code computes, written down once more.


def oracle_slices(picture: np.ndarray, most: int, scale: int) -> list[np.ndarray]:
    """The whole picture and its cells, resized: uint8 [height, width, 3] each."""
    one = Image.fromarray(picture)
    width, height = one.size

    def nearest(length: float, step: int) -> int:
        return max(round(length / step) * step, step)

    def fitting(w: float, h: float, upscale: bool) -> tuple[int, int]:
        if w * h > scale * scale or upscale:
            ratio = w / h
            h = int(scale / math.sqrt(ratio))
            w = int(h * ratio)
        return nearest(w, 14), nearest(h, 14)

    wanted = min(math.ceil(width * height / (scale * scale)), most)
    if wanted <= 1:
        return [np.array(one.resize(fitting(width, height, True), Image.Resampling.BICUBIC))]
    best, least = None, math.inf
    for number in [wanted - 1, wanted, wanted + 1]:
        if number == 1 or number > most:
            continue
        for cols in [c for c in range(1, number + 1) if number % c == 0]:
            rows = number // cols
            error = abs(math.log(width / height) - math.log(cols / rows))
            if error < least:
                best, least = (cols, rows), error
    assert best is not None
    cols, rows = best
    cell_w, cell_h = fitting(nearest(width, cols) / cols, nearest(height, rows) / rows, True)
    large = one.resize((cell_w * cols, cell_h * rows), Image.Resampling.BICUBIC)
    cells = [
        large.crop((x * cell_w, y * cell_h, (x + 1) * cell_w, (y + 1) * cell_h))
        for y in range(rows)
        for x in range(cols)
    ]
    return [np.array(one.resize(fitting(width, height, False), Image.Resampling.BICUBIC)), *map(np.array, cells)]


def oracle_positions(size: int, lines: int, columns: int) -> torch.Tensor:
    """[lines * columns, size] sines and cosines, of the column first."""
    omega = 1.0 / 10000 ** (np.arange(size // 4, dtype=np.float32) / (size / 4.0))
    place = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(lines, dtype=np.float32))
    halves = []
    for axis in place:
        angle = np.einsum("yx,d->yxd", axis, omega)
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1))
    return torch.from_numpy(np.concatenate(halves, axis=-1)).reshape(lines * columns, size)


def oracle_moment(size: int, tenths: int) -> torch.Tensor:
    angles = tenths / 10000 ** (2 * np.arange(size // 2) / size)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)])).float()


def oracle_packs(counts: Sequence[int], cells: int) -> list[list[int]]:
    """Of slices frame by frame: which the resampler reads together, if so many frames make a pack."""
    frames = iter(range(sum(counts)))
    groups = [[next(frames) for _ in range(count)] for count in counts]
    return [[frame * cells + cell for frame in group] for group in groups for cell in range(cells)]


def oracle_rows(
    parts: checkpoints.Parts,
    item: MediaItem,
    *,
    most: int = 9,
    scale: int = 56,
    packs: Sequence[Sequence[int]] = (),
    tenths: Sequence[int] = (),
) -> torch.Tensor:
    own, frames = parts.own, item.data if item.kind == "video" else item.data[None]
    size = own["proj"].shape[0]
    attention = torch.nn.MultiheadAttention(size, size // 128, batch_first=True)
    attention.load_state_dict({key.removeprefix("attn."): own[key] for key in own if key.startswith("attn.")})
    slices = [one for frame in frames for one in oracle_slices(frame, most, scale)]
    grids = [(one.shape[0] // 14, one.shape[1] // 14) for one in slices]
    high, wide = (max(grid[axis] for grid in grids) for axis in (0, 1))
    pixels, mask = torch.zeros(len(slices), 3, high * 14, wide * 14), torch.zeros(len(slices), high, wide).bool()
    for index, (one, (lines, columns)) in enumerate(zip(slices, grids, strict=True)):
        values = torch.from_numpy(one).permute(2, 0, 1).float()
        pixels[index, :, : lines * 14, : columns * 14] = (values / 255 - 0.5) / 0.5
        mask[index, :lines, :columns] = True

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (size,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)

    rows = []
    with torch.inference_mode():
        states = parts.vision(pixels, patch_attention_mask=mask).last_hidden_state
        for pack in packs or [[index] for index in range(len(slices))]:
            seen = [
                norm("ln_kv", functional.linear(states[one][mask[one].flatten()], own["kv_proj.weight"]))
                for one in pack
            ]
            keys = [
                value + oracle_positions(size, *grids[one]) + (oracle_moment(size, tenths[one]) if tenths else 0)
                for one, value in zip(pack, seen, strict=True)
            ]
            out, _ = attention(norm("ln_q", own["query"])[None], torch.cat(keys)[None], torch.cat(seen)[None])
            rows.append(norm("ln_post", out[0]) @ own["proj"])
    return torch.cat(rows)


def oracle_embeddings(
    parts: checkpoints.Parts, prompt: Prompt, media: Sequence[MediaItem], tokenizer: Tokenizer
) -> torch.Tensor:
    """Rows go between the brackets of the prompt, whatever spans it names."""
    starts = {tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<slice>")}
    places = [i + 1 for i, token in enumerate(prompt.token_ids.tolist()) if token in starts]
    made = torch.cat([oracle_rows(parts, item, most=9 if item.kind == "image" else 2) for item in media])
    with torch.inference_mode():
        rows = parts.text.get_input_embeddings()(torch.from_numpy(prompt.token_ids).long())
        for place, four in zip(places, made.split(4), strict=True):
            rows[place : place + 4] = four
    return rows


@dataclass
class Served:
    parts: checkpoints.Parts
    model: MiniCPMV
    processor: MiniCPMVProcessor

    def encode(self, kind: Modality, media: Sequence[MediaFeatures]) -> list[torch.Tensor]:
        items = [{name: torch.from_numpy(array) for name, array in one.arrays.items()} for one in media]
        with torch.inference_mode():
            return self.model.encode(kind, items)

    def prompt(
        self, media: Sequence[MediaItem], text: str = "<|im_start|>user\n{}\nWhat is shown?<|im_end|>\n"
    ) -> Prompt:
        marks = "\n".join(self.processor.placeholder(item.kind, 0) for item in media)
        return self.processor.build(text.format(marks), [self.processor.process(item) for item in media])

    def run(self, prompt: Prompt) -> Running:
        ids = torch.from_numpy(prompt.token_ids).long()
        rows = self.model.embed(ids).clone()
        encoded = [self.encode(one.kind, [one])[0] for one in prompt.media]
        for span in prompt.spans:
            rows[span.offset : span.offset + span.length] = encoded[span.item][span.row : span.row + span.length]
        return Running(ids.tolist(), rows=rows)


def load(folder: Path, parts: checkpoints.Parts) -> Served:
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert isinstance(model, MiniCPMV)
    return Served(parts, model, MiniCPMVProcessor(checkpoint, Tokenizer.from_folder(folder)))


@pytest.fixture(scope="module", name="here")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("minicpmv")
    return load(folder, checkpoints.make_minicpmv(folder))


@pytest.fixture(scope="module")
def latest(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("minicpmv45")
    return load(folder, checkpoints.make_minicpmv(folder, version=4.5))


def media() -> list[MediaItem]:
    return [noise(50, 70, seed=1), noise(40, 90, frames=3, seed=2), noise(120, 60, seed=3)]


def processor(config: dict[str, Any] | None = None, **overrides: Any) -> MiniCPMVProcessor:
    return MiniCPMVProcessor(record(config or {}, {}), word_tokenizer(IDS), overrides)


# Slices, counts and pixels.


@pytest.mark.parametrize(
    ("width", "height", "grid", "whole", "refined", "rows"),
    [
        (448, 448, None, (448, 448), None, 64),
        (100, 100, None, (448, 448), None, 64),
        (640, 480, (2, 1), (518, 392), (728, 546), 192),
        (480, 640, (1, 2), (392, 518), (546, 728), 192),
        (1200, 300, (3, 1), (896, 224), (1554, 392), 256),
        (1344, 1344, (3, 3), (448, 448), (1344, 1344), 640),
    ],
)
def test_golden(
    width: int,
    height: int,
    grid: tuple[int, int] | None,
    whole: tuple[int, int],
    refined: tuple[int, int] | None,
    rows: int,
) -> None:
    plan = slicing(height, width, 9, 448, 14)
    assert plan.whole == whole[::-1]
    assert (plan.columns, plan.rows) == (grid or (0, 0))
    if refined is not None:
        assert (plan.slice[1] * plan.columns, plan.slice[0] * plan.rows) == refined
    assert processor().num_tokens("image", height, width) == rows


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 4, 9]))
def test_pixels(height: int, width: int, most: int) -> None:
    here = processor({"slice_config": {"scale_resolution": 56}}, max_slice_nums=most)
    item = noise(height, width)
    features = here.process(item)
    expected = oracle_slices(item.data, most, 56)
    assert features.num_rows == here.num_tokens("image", height, width) == 64 * len(expected)
    assert features.arrays["grids"].tolist() == [[one.shape[0] // 14, one.shape[1] // 14] for one in expected]
    patches = iter(features.arrays["patches"])
    for one in expected:
        for top in range(0, one.shape[0], 14):
            for left in range(0, one.shape[1], 14):
                cut = one[top : top + 14, left : left + 14].transpose(2, 0, 1).flatten()
                np.testing.assert_array_equal(next(patches), cut)


def test_extreme_shapes() -> None:
    here = processor()
    for size in [(1, 1), (4, 800), (4000, 20), (4000, 4000)]:
        assert 64 <= here.num_tokens("image", *size) <= 640
    thin = here.process(noise(5, 1000))
    assert thin.arrays["grids"].max() > 70, "wider than the table of positions"


def test_videos_are_frames_with_fewer_slices() -> None:
    here = processor()
    assert here.num_tokens("video", 720, 1280, 8) == 8 * 3 * 64
    assert here.with_overrides({"video_max_slice_nums": 1}).num_tokens("video", 720, 1280, 8) == 8 * 64
    assert here.with_overrides({"max_slice_nums": 1}).num_tokens("image", 720, 1280) == 64
    video = noise(600, 500, frames=2)
    features = here.process(video)
    assert features.num_rows == here.num_tokens("video", 600, 500, 2) == 2 * 3 * 64
    alone = here.with_overrides({"max_slice_nums": 2})
    frames = [alone.process(MediaItem("image", frame, b"")).arrays for frame in video.data]
    for name in ("patches", "grids"):
        np.testing.assert_array_equal(features.arrays[name], np.concatenate([frame[name] for frame in frames]))


def test_frames_are_taken_once_a_second_and_thinned_evenly() -> None:
    sampling = processor().video_sampling()
    assert sampling.indices(300, 10.0, 128) == list(range(0, 300, 30))
    long = sampling.indices(6000, 200.0, 128)
    gap = 200 / 64
    assert long == [30 * int(i * gap + gap / 2) for i in range(64)]
    assert len(processor(max_frames=8).video_sampling().indices(6000, 200.0, 128)) == 8
    assert len(processor(num_frames=5).video_sampling().indices(6000, 200.0, 128)) == 5


def test_packed_frames_have_the_rows_of_one() -> None:
    here = processor({"version": 4.5}, packing_nums=3)
    assert here.num_tokens("video", 720, 1280, 8) == 3 * 64, "and no slices, as the model's card has it"
    assert here.with_overrides({"video_max_slice_nums": 2}).num_tokens("video", 720, 1280, 8) == 3 * 3 * 64
    assert here.num_tokens("image", 720, 1280) == processor().num_tokens("image", 720, 1280)
    assert here.video_sampling().max_frames == 3 * 64
    video = dataclasses.replace(noise(50, 50, frames=5), timestamps_s=(0.0, 0.26, 4.3, 8.64, 100.0))
    features = here.process(video)
    assert features.num_rows == here.num_tokens("video", 50, 50, 5) == 2 * 64
    assert features.arrays["packs"].tolist() == [3, 2]
    assert features.arrays["times"].tolist() == [0, 3, 43, 86, 1000]
    frame = [151646, *[128244] * 64, 151647]
    prompt = here.build(here.placeholder("video", 0), [features])
    assert prompt.token_ids.tolist() == [*frame, 10, *frame]
    assert here.process(noise(50, 50, frames=3)).arrays["times"].tolist() == [0, 10, 20], "one a second"


@pytest.mark.parametrize("version", [2.6, 4.0])
def test_only_one_version_packs(version: float) -> None:
    with pytest.raises(StartupError, match=f"'packing_nums' needs MiniCPM-V 4.5; this is version {version}"):
        processor({"version": version}, packing_nums=2)
    with pytest.raises(RequestError, match="leave it out"):
        processor({"version": version}).with_overrides({"packing_nums": 2})
    with pytest.raises(RequestError, match="from 1 to 6"):
        processor({"version": 4.5}).with_overrides({"packing_nums": 7})


def test_slicing_switched_off() -> None:
    here = MiniCPMVProcessor(record({}, {"slice_mode": False}), word_tokenizer(IDS))
    assert here.num_tokens("image", 1344, 1344) == 64


# Prompts.


def test_placeholders_are_numbered_by_their_place() -> None:
    here = processor()
    small, tall = here.process(noise(100, 100)), here.process(noise(1200, 400))
    row = [151646, *[128244] * 64, 151647]
    cell = [151656, *[128244] * 64, 151657]
    tag = here.placeholder("image", 0)
    for order in ([small, tall], [tall, small]):
        prompt = here.build(f"a{tag}b{tag}\nc", order)
        expected = [97]
        for index, one in enumerate(order):
            expected += [151658, 48 + index, 151659, *row]
            if one is tall:
                assert one.arrays["layout"].tolist() == [1, 3, 1]
                expected += [*cell, 10, *cell, 10, *cell]
            expected += [[98], [10, 99]][index]
        assert prompt.token_ids.tolist() == expected
        assert [s.row for s in prompt.spans if order[s.item] is tall] == [0, 64, 128, 192]
        assert all(prompt.token_ids[s.offset - 1] in (151646, 151656) for s in prompt.spans)


def test_videos_have_no_numbers_and_do_not_count() -> None:
    here = processor()
    picture, video = here.process(noise(50, 50)), here.process(noise(600, 500, frames=2))
    image, clip = (here.placeholder(kind, 0) for kind in ("image", "video"))
    prompt = here.build(f"{clip}{image}", [video, picture])
    frame = [151646, *[128244] * 64, 151647, 151656, *[128244] * 64, 151657, 10, 151656, *[128244] * 64, 151657]
    assert prompt.token_ids.tolist() == [*frame, *frame, 151658, 48, 151659, 151646, *[128244] * 64, 151647]
    assert [(s.item, s.row) for s in prompt.spans] == [*((0, 64 * i) for i in range(6)), (1, 0)]


def test_numbers_can_be_left_out() -> None:
    here = processor(use_image_id=False)
    prompt = here.build(here.placeholder("image", 0), [here.process(noise(50, 50))])
    assert prompt.token_ids.tolist() == [151646, *[128244] * 64, 151647]


@pytest.mark.parametrize("count", [0, 2])
def test_every_tag_needs_its_medium(count: int) -> None:
    here = processor()
    with pytest.raises(RequestError, match="placeholder") as refused:
        here.build(here.placeholder("image", 0), [here.process(noise(20, 20))] * count)
    assert refused.value.code == "media_count_mismatch"


def test_no_tag_comes_from_foreign_text(here: Served) -> None:
    tokenizer = here.processor.tokenizer.with_literals(here.processor.literals)
    for typed in ("(<image>./</image>)", "(<video>./</video>)", "<image>", "<slice><unk></slice>"):
        prompt = here.processor.build(f"see {tokenizer.escape(typed)}", [])
        assert not prompt.spans
        assert not tokenizer.special_ids.intersection(prompt.token_ids.tolist())
        assert tokenizer.decode(prompt.token_ids.tolist()) == f"see {typed}"


def test_text_is_tokenized_as_one(here: Served) -> None:
    """The published code writes the placeholders into the text and tokenizes all of it."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(here.model.checkpoint.folder)
    picture = noise(40, 130)
    whole, cell = f"<image>{'<unk>' * 4}</image>", f"<slice>{'<unk>' * 4}</slice>"
    assert here.processor.process(picture).arrays["layout"].tolist() == [1, 1, 3]
    text = f"<|im_start|>user\nLook: <image_id>0</image_id>{whole}{cell * 3}\n and at <image_id>1</image_id>{whole}!"
    prompt = here.processor.build(
        "<|im_start|>user\nLook: (<image>./</image>)\n and at (<image>./</image>)!",
        [here.processor.process(one) for one in (picture, noise(50, 50))],
    )
    assert prompt.token_ids.tolist() == theirs(text).input_ids


# Numbers.


def test_rows_equal_the_composition(here: Served) -> None:
    items = [noise(*size, seed=i) for i, size in enumerate(SIZES)]
    features = [here.processor.process(item) for item in items]
    for ours, item, one in zip(here.encode("image", features), items, features, strict=True):
        assert len(ours) == one.num_rows
        torch.testing.assert_close(ours, oracle_rows(here.parts, item), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(here.encode("image", [one])[0], ours, atol=1e-5, rtol=1e-5)
    assert len({rows.untyped_storage().data_ptr() for rows in here.encode("image", features)}) == len(items)


def test_rows_of_videos_equal_the_composition(here: Served) -> None:
    for frames in (1, 3):
        video = noise(60, 90, frames=frames, seed=frames)
        ours = here.encode("video", [here.processor.process(video)])[0]
        torch.testing.assert_close(ours, oracle_rows(here.parts, video, most=2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("packing", "counts"), [(1, [1, 1, 1, 1, 1]), (3, [3, 2]), (6, [5])])
@pytest.mark.parametrize("most", [1, 2])
def test_rows_of_packed_frames_equal_the_composition(
    latest: Served, packing: int, counts: list[int], most: int
) -> None:
    seconds = (0.0, 0.34, 5.0, 61.75, 3600.5)
    video = dataclasses.replace(noise(60, 90, frames=5, seed=7), timestamps_s=seconds)
    packed = latest.processor.with_overrides({"packing_nums": packing, "video_max_slice_nums": most})
    features = packed.process(video)
    cells = len(oracle_slices(video.data[0], most, 56))
    packs = oracle_packs(counts, cells)
    assert (cells > 1) == (most > 1)
    assert features.num_rows == 4 * len(packs) == packed.num_tokens("video", 60, 90, 5)
    tenths = [round(10 * second) for second in seconds for _ in range(cells)]
    theirs = oracle_rows(latest.parts, video, most=most, packs=packs, tenths=tenths)
    plain = latest.processor.process(noise(50, 50, frames=2))
    for ours in (latest.encode("video", [features])[0], latest.encode("video", [plain, features])[1]):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    timeless = oracle_rows(latest.parts, video, most=most, packs=packs)
    differs = bool((theirs - timeless).abs().max() > 1e-3)
    assert differs == (packing > 1), "a time that all keys share changes nothing"


@pytest.mark.parametrize("side", [10, 70])
def test_fields_of_positions_equal_idefics2(side: int) -> None:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = Idefics2VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    theirs, table = Idefics2VisionEmbeddings(config), PositionTable(side, 1)
    torch.nn.init.zeros_(theirs.patch_embedding.weight)
    torch.nn.init.zeros_(theirs.patch_embedding.bias)
    theirs.position_embedding.weight.data = torch.arange(side * side, dtype=torch.float32)[:, None]
    for lines in [*range(1, 141), 500]:
        mask = torch.ones(1, lines, 2, dtype=torch.bool)
        expected = theirs(torch.zeros(1, 3, lines, 2), mask)[0, :, 0]
        assert table.ids(lines, 2).tolist() == expected.long().tolist()


def test_logits_and_greedy_tokens_equal_the_composition(here: Served) -> None:
    for items in ([], media()[:1], media()):
        prompt = here.prompt(items)
        embeddings = (
            oracle_embeddings(here.parts, prompt, items, here.processor.tokenizer)
            if items
            else here.parts.text.get_input_embeddings()(torch.from_numpy(prompt.token_ids).long()).detach()
        )
        with torch.inference_mode():
            theirs = here.parts.text(inputs_embeds=embeddings[None]).logits[0]
        torch.testing.assert_close(Driver(here.model).prefill(here.run(prompt)), theirs, atol=1e-4, rtol=0)
        ours = Driver(here.model).greedy([here.run(prompt)], 32)[0]
        made = here.parts.text.generate(
            inputs_embeds=embeddings[None], max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert ours == made[0].tolist()
        assert len(set(ours)) > 4, "a model that runs in circles shows nothing"


@pytest.mark.parametrize("version", [4.0, 4.5])
def test_later_versions_have_other_decoders(version: float, tmp_path: Path) -> None:
    test_logits_and_greedy_tokens_equal_the_composition(
        load(tmp_path, checkpoints.make_minicpmv(tmp_path, version=version))
    )


def test_prefill_cut_everywhere_inside_media(here: Served) -> None:
    prompt = here.prompt(media())
    driver = Driver(here.model, num_blocks=8192)
    whole, run = driver.prefill(here.run(prompt)), here.run(prompt)
    for place in sorted({place for s in prompt.spans for place in range(s.offset, s.offset + s.length + 1)}):
        again = Running(list(run.tokens), rows=run.rows)
        torch.testing.assert_close(driver.prefill(again, place), whole, atol=1e-4, rtol=0)


def test_unequal_requests_in_one_engine_equal_one_by_one(here: Served) -> None:
    prompts = [here.prompt(media()[i % 3 :], text="{}" + "word " * i + "?") for i in range(5)]
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    requests = [EngineRequest(i, prompt, sampling) for i, prompt in enumerate(prompts)]
    results = bench(here.model, max_num_batched_tokens=50).run(*requests)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == Driver(here.model).greedy([here.run(prompt)], 12)[0]


def test_bfloat16_rows_are_close(here: Served) -> None:
    model = load_model(here.model.checkpoint, dtype=torch.bfloat16, device="cpu")
    features = [here.processor.process(noise(*size, seed=i)) for i, size in enumerate(SIZES)]
    items = [{name: torch.from_numpy(array) for name, array in one.arrays.items()} for one in features]
    with torch.inference_mode():
        for ours, expected in zip(model.encode("image", items), here.encode("image", features), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours.float() - expected).norm() < 0.03 * expected.norm()


# Checkpoints.


@pytest.mark.parametrize("options", [{"shards": 3}, {"pickled": True}, {"dtype": "bfloat16"}], ids=str)
def test_files(options: dict[str, Any], tmp_path: Path) -> None:
    here = load(tmp_path, checkpoints.make_minicpmv(tmp_path, **options))
    item = noise(50, 70)
    ours = here.encode("image", [here.processor.process(item)])[0]
    torch.testing.assert_close(ours, oracle_rows(here.parts, item), atol=1e-5, rtol=1e-4)


def test_the_last_layer_may_be_dropped(tmp_path: Path) -> None:
    shorter = checkpoints.make_minicpmv(tmp_path / "short", vision={"num_hidden_layers": 1})
    checkpoints.make_minicpmv(tmp_path / "long")
    tensors = checkpoints.read_weights(tmp_path / "short")
    extra = {
        key: value
        for key, value in checkpoints.read_weights(tmp_path / "long").items()
        if ".layers.1." in key and key.startswith("vpm.")
    }
    for stored in (tensors, tensors | extra | {"resampler.pos_embed": torch.zeros(2, 2)}):
        checkpoints.write_weights(tmp_path / "short", stored)
        config = json.loads((tmp_path / "short" / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 2
        config.pop("drop_vision_last_layer", None)  # true where it is not said
        (tmp_path / "short" / "config.json").write_text(json.dumps(config))
        here = load(tmp_path / "short", shorter)
        item = noise(50, 70)
        ours = here.encode("image", [here.processor.process(item)])[0]
        torch.testing.assert_close(ours, oracle_rows(shorter, item), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2.5}, "version 2.5 is not supported"),
        ({"version": None}, "version None is not supported"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower 'clip_vision_model' is not supported"),
        ({"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}, "192 is no multiple of"),
    ],
)
def test_unsupported_configurations(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    checkpoints.make_minicpmv(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=problem):
        load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_files_that_do_not_fit_together() -> None:
    with pytest.raises(CheckpointError, match="image_feature_size"):
        MiniCPMVProcessor(record({"query_num": 64}, {"image_feature_size": 32}), word_tokenizer(IDS))
    with pytest.raises(StartupError, match=r"lacks tokens .* <slice>, </slice>"):
        MiniCPMVProcessor(record({}, {}), word_tokenizer({k: v for k, v in IDS.items() if "slice" not in k}))
    assert set(TOKENS.values()) == set(IDS) - {"<s>"}


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    checkpoints.make_minicpmv(tmp_path)
    tensors = checkpoints.read_weights(tmp_path)
    for key in ("resampler.query", "vpm.post_layernorm.bias", "resampler.attn.in_proj_bias"):
        checkpoints.write_weights(tmp_path, {name: value for name, value in tensors.items() if name != key})
        with pytest.raises(CheckpointError, match=f"missing {key}"):
            load_model(open_checkpoint(tmp_path), dtype=torch.float32, device="cpu")


def test_its_own_chat_template(here: Served) -> None:
    tokenizer = here.processor.tokenizer.with_literals(here.processor.literals, special=True)
    template = LocalTemplate(
        FAMILIES["MiniCPMV"].chat_template or "",
        tokenizer,
        modalities=here.processor.modalities,
        placeholder=here.processor.placeholder,
    )
    forged = TextPart("no (<image>./</image>)")
    parts = (MediaPart("video"), MediaPart("image"), TextPart("What?"))
    text = template.render([Message("user", parts), Message("assistant", (forged,)), Message("user", (forged,))])
    assert tokenizer.unescape(text) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n(<video>./</video>)\n(<image>./</image>)\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nno (<image>./</image>)<|im_end|>\n<|im_start|>user\nno (<image>./</image>)<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    made = [here.processor.process(item) for item in (noise(50, 50, frames=2), noise(20, 20))]
    assert {span.item for span in here.processor.build(text, made).spans} == {0, 1}


def test_length_of_the_text_before_media_are_decoded(here: Served) -> None:
    text = "<|im_start|>(<image>./</image>)\nand(<video>./</video>)!"
    prompt = here.processor.build(text, [here.processor.process(one) for one in (noise(50, 50), noise(9, 9, frames=2))])
    rows = sum(span.length for span in prompt.spans)
    assert here.processor.text_length(text) == len(prompt.token_ids) - rows - 3 - 2 * 3, "all but brackets and number"
