"""Vision towers of Qwen2-VL and Qwen2.5: patches of images and videos of any size, flat, 2-D rotary positions.

Attention stays inside one temporal slice (an image, or a pair of a video's frames), so slices are what a batch is cut
into. Patches of a slice come ordered by 2x2 blocks; each block becomes one row of the language model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sensorium import kernels
from sensorium.checkpoint.values import indices, number, positive_int, square, unsupported
from sensorium.errors import CheckpointError
from sensorium.models.base import Rename, Steps
from sensorium.models.layers import MLP, Linear, QKVLinear, RMSNorm
from sensorium.models.towers.blocks import (
    MAX_ROWS,
    LayerNorm,
    Mlp,
    PatchLinear,
    attention,
    by_rows,
    group_rows,
    groups,
    separate,
    weights,
)

CACHED_GRIDS = 32
EPS = 1e-6
THETA = 10000.0
QWEN_VIT_MAP = tuple(
    Rename(f"visual.blocks.{{n}}.attn.{part}.{{p}}", "visual.blocks.{n}.attn.qkv.{p}", part) for part in "qkv"
)
"""Of products that are stored apart, as Qwen2.5-Omni has them, and GGUF files of any."""
WINDOWED_VIT_MAP = (
    *QWEN_VIT_MAP,
    Rename("visual.blocks.{n}.mlp.gate_proj.{p}", "visual.blocks.{n}.mlp.gate_up_proj.{p}", "gate"),
    Rename("visual.blocks.{n}.mlp.up_proj.{p}", "visual.blocks.{n}.mlp.gate_up_proj.{p}", "up"),
)

Norm = Callable[[int, float], LayerNorm | RMSNorm]
Size = tuple[int, int]  # lines and columns of patches


@dataclass(frozen=True, slots=True)
class QwenVitConfig:
    """The shape of either tower."""

    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    hidden_act: str
    theta: float = 10000.0  # of the rotary positions
    window_size: int = 0  # pixels of a window's side; 0: no windows
    full_attention_layers: tuple[int, ...] = ()  # those that no window cuts
    table_rows: int = 0  # of a table of learned positions, which is square; 0: there is none
    tapped_layers: tuple[int, ...] = ()  # whose outputs are merged for the decoder too, by mergers in this order
    bias: bool = True  # of the layers' products
    qkv_bias: bool = False  # of queries, keys and values in any case
    eps: float = EPS
    qk_norm: bool = False  # of every head

    @classmethod
    def of(cls, vision: Mapping[str, Any]) -> QwenVitConfig:
        """`vision_config` of Qwen2-VL in either dialect; transformers' defaults. Its `hidden_size` is the output's."""
        given = _Given(vision)
        embed_dim = given.of("embed_dim", 1280)
        return cls(
            **given.common(),
            embed_dim=embed_dim,
            intermediate_size=int(embed_dim * given.of("mlp_ratio", 4.0)),
            hidden_act=given.of("hidden_act", "quick_gelu"),
        )

    @classmethod
    def windowed(cls, vision: Mapping[str, Any], embed_dim: int) -> QwenVitConfig:
        """`vision_config` of the 2.5 generation. `embed_dim` is where it has no `hidden_size`."""
        given = _Given(vision)
        return cls(
            **given.common(),
            embed_dim=given.of("hidden_size", embed_dim),
            intermediate_size=given.of("intermediate_size", 3420),
            hidden_act=given.of("hidden_act", "silu"),
            window_size=given.of("window_size", 112),
            full_attention_layers=tuple(given.of("fullatt_block_indexes", (7, 15, 23, 31))),
        )

    @classmethod
    def of_qwen3(cls, vision: Mapping[str, Any]) -> QwenVitConfig:
        """`vision_config` of Qwen3-VL."""
        given = _Given(vision)
        return cls(
            **given.common(depth=27, patch_size=16),
            embed_dim=given.of("hidden_size", 1152),
            intermediate_size=given.of("intermediate_size", 4304),
            hidden_act=given.of("hidden_act", "gelu_pytorch_tanh"),
            table_rows=given.of("num_position_embeddings", 2304),
            tapped_layers=tuple(given.of("deepstack_visual_indexes", (8, 16, 24))),
        )

    @classmethod
    def of_glm(cls, vision: Mapping[str, Any], *, is_ocr: bool) -> tuple[QwenVitConfig, int, int]:
        """(`vision_config` of GLM-4.1V or GLM-OCR, numbers in a row, inner size of the MLP that makes it)."""
        given = _Given(vision)
        out, inner = given.of("out_hidden_size", 1536 if is_ocr else 4096), given.of("intermediate_size", 4096)
        shape = given.common(depth=24)
        config = cls(
            **{**shape, "num_heads": given.of("num_heads", 16 if is_ocr else 12)},
            embed_dim=given.of("hidden_size", 1024 if is_ocr else 1536),
            intermediate_size=inner if is_ocr else out,
            hidden_act=given.of("hidden_act", "silu"),
            table_rows=0 if is_ocr else (square(vision, "image_size", 336) // shape["patch_size"]) ** 2,
            qkv_bias=given.of("attention_bias", is_ocr),
            bias=is_ocr and given.of("attention_bias", True),
            eps=given.of("rms_norm_eps", 1e-5),
            qk_norm=is_ocr,
        )
        return config, out, 3 * out if is_ocr else given.of("intermediate_size", 13696)


@dataclass(frozen=True, slots=True)
class _Given:
    vision: Mapping[str, Any]

    def of(self, name: str, default: Any) -> Any:
        """Of the default's type. CheckpointError if it is of another."""
        if isinstance(default, bool):
            return bool(default if self.vision.get(name) is None else self.vision[name])
        if isinstance(default, int):
            return positive_int(self.vision, name, default)
        if isinstance(default, float):
            return number(self.vision, name, default)
        if isinstance(default, tuple):
            found = indices(self.vision, name)
            return default if found is None else found
        value = self.vision.get(name)
        return default if value is None else str(value)

    def common(self, depth: int = 32, patch_size: int = 14) -> dict[str, Any]:
        if (channels := self.of("in_channels", self.of("in_chans", 3))) != 3:
            raise CheckpointError(f"config.json: vision_config has {channels} in_channels, images here have 3")
        return {
            "depth": self.of("depth", depth),
            "theta": axial_theta(self.vision),
            "num_heads": self.of("num_heads", 16),
            "patch_size": self.of("patch_size", self.of("spatial_patch_size", patch_size)),
            "temporal_patch_size": self.of("temporal_patch_size", 2),
            "spatial_merge_size": self.of("spatial_merge_size", 2),
        }


def axial_theta(vision: Mapping[str, Any], default: float = THETA) -> float:
    """Of the rotary positions of `vision_config`. CheckpointError if they are of another kind."""
    rope = vision.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "axial")) not in ("axial", "default"):
        raise unsupported("vision_config rope_type", kind, ("axial",))
    return number(rope, "rope_theta", default)


class VisionAttention(nn.Module):
    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        size, num_heads = config.embed_dim, config.num_heads
        self.num_heads = num_heads
        self.head_dim = size // num_heads
        self.qkv = QKVLinear(size, num_heads, num_heads, self.head_dim, bias=config.bias or config.qkv_bias)
        self.proj = Linear(size, size, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.eps) if config.qk_norm else None

    def forward(
        self, norm: LayerNorm | RMSNorm, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]
    ) -> Steps[Tensor]:
        """Of the normed x, without the last product."""
        qkv = yield from by_rows(lambda rows: self.qkv(norm(rows)), weights(self.qkv), x)
        q, k, v = qkv.view(len(x), 3, self.num_heads, self.head_dim).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k = kernels.rope(q, k, cos, sin)
        attended = yield from attention(q, k, v, lengths, self.head_dim**-0.5)
        return attended.reshape(len(x), -1)


class VisionBlock(nn.Module):
    def __init__(self, config: QwenVitConfig, norm: Norm, mlp: Callable[[int, int, str], nn.Module]) -> None:
        super().__init__()
        size = config.embed_dim
        self.norm1 = norm(size, config.eps)
        self.norm2 = norm(size, config.eps)
        self.attn = VisionAttention(config)
        self.mlp = mlp(size, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Steps[Tensor]:
        attended = yield from self.attn(self.norm1, x, cos, sin, lengths)
        return (yield from by_rows(self._rest, weights(self.attn.proj, self.mlp), x, attended))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attn.proj(attended)
        x += self.mlp(self.norm2(x))
        return x


class PatchEmbed(nn.Module):
    """[patches, 3 * frames * side * side] -> [patches, embed]. An image's patches come with one frame, shown twice."""

    def __init__(self, config: QwenVitConfig, *, bias: bool) -> None:
        super().__init__()
        self.frames = config.temporal_patch_size
        self.area = config.patch_size**2
        frames = () if self.frames == 1 else (self.frames,)  # a tower of images alone has no axis for them
        self.proj = PatchLinear(config.embed_dim, 3, *frames, config.patch_size, config.patch_size, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] < 3 * self.frames * self.area:
            pixels = pixels.view(-1, 3, 1, self.area).expand(-1, 3, self.frames, self.area).reshape(len(pixels), -1)
        out: Tensor = self.proj(pixels)
        return out


class Merger(nn.Module):
    """What makes rows of the language model, in steps, of patches [patches, embed]."""

    block: int  # elements of the patches that become one row

    def forward(self, x: Tensor) -> Steps[Tensor]:
        raise NotImplementedError


class PatchMerger(Merger):
    """The patches of a block side by side -> one row of the language model. Normed are patches or, with `by_blocks`,
    blocks."""

    def __init__(self, config: QwenVitConfig, out_features: int, norm: Norm, *, by_blocks: bool = False) -> None:
        super().__init__()
        self.block = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = norm(self.block if by_blocks else config.embed_dim, EPS)
        self.mlp = nn.ModuleDict(
            {"0": Linear(self.block, self.block, bias=True), "2": Linear(self.block, out_features, bias=True)}
        )

    def forward(self, x: Tensor) -> Steps[Tensor]:
        return (yield from by_rows(self._merged, weights(self.mlp), x.view(-1, self.block)))

    def _merged(self, blocks: Tensor) -> Tensor:
        rows = self.ln_q(blocks.reshape(-1, self.ln_q.weight.shape[0])).view(-1, self.block)
        out: Tensor = self.mlp["2"](functional.gelu(self.mlp["0"](rows)))
        return out


@dataclass(frozen=True, slots=True)
class _Grid:
    """What depends on a slice's size alone. Patches go through the layers in the order of `order` (blocks; None: as
    they come), in which each window is one run."""

    cos: Tensor  # [patches, head_dim / 2]
    sin: Tensor
    windows: list[int]  # patches in each
    order: Tensor | None


class QwenVit(nn.Module):
    """Qwen2-VL's tower."""

    def __init__(
        self,
        config: QwenVitConfig,
        out_features: int,
        *,
        norm: Norm = LayerNorm,
        mlp: Callable[[int, int, str], nn.Module] = Mlp,
        patch_bias: bool = False,
        merger: Merger | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, bias=patch_bias)
        self.blocks = nn.ModuleList(VisionBlock(config, norm, mlp) for _ in range(config.depth))
        self.merger = merger or PatchMerger(config, out_features, norm)
        self._grids: OrderedDict[Size, _Grid] = OrderedDict()

    def activation_bytes(self, element_size: int, largest_slice: int) -> int:
        """For groups of patches that hold no more than a slice of `largest_slice`, where that alone exceeds a group."""
        config = self.config
        patches = max(MAX_ROWS, largest_slice)
        pixels = 3 * config.temporal_patch_size * config.patch_size**2
        inner = 3 * config.intermediate_size
        return int(element_size * (patches * (10 * config.embed_dim + 2 * pixels) + MAX_ROWS * inner))

    def steps(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, int, int]]) -> Steps[list[Tensor]]:
        """Per item: patches [frames * lines * columns, …], of the weights' type, and their grid -> rows
        [patches / merge², out_features]."""
        slices = [part for whole, (_, h, w) in zip(pixels, grids, strict=True) for part in torch.split(whole, h * w)]
        sizes = [(h, w) for t, h, w in grids for _ in range(t)]
        rows = []
        for group in groups([h * w for h, w in sizes], group_rows(pixels[0])):
            rows.append((yield from self._encode(slices[group], sizes[group])))
        merged = self.config.spatial_merge_size**2
        return separate(rows[0] if len(rows) == 1 else torch.cat(rows), [t * h * w // merged for t, h, w in grids])

    def _encode(self, slices: Sequence[Tensor], sizes: Sequence[Size]) -> Steps[Tensor]:
        """Of one group -> [blocks, out_features], in the order in which the blocks came."""
        embedded = []
        for part in _alike(slices):
            embedded.append((yield from by_rows(self.patch_embed, weights(self.patch_embed), part)))
        x = embedded[0] if len(embedded) == 1 else torch.cat(embedded)
        x = yield from self._placed(x, sizes)
        grids = [self._grid(size, x.device) for size in sizes]
        cos, sin = torch.cat([grid.cos for grid in grids]), torch.cat([grid.sin for grid in grids])
        order = self._order(grids, sizes)
        if order is not None:
            x = x.view(-1, self.merger.block)[order].view(x.shape)
        windows = [run for grid in grids for run in grid.windows]
        rows = yield from self._rows(x, cos, sin, [h * w for h, w in sizes], windows)
        return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)

    def _placed(self, x: Tensor, sizes: Sequence[Size]) -> Steps[Tensor]:
        """Patches that know where they are, where a tower tells them before its first layer."""
        yield from ()
        return x

    def _rows(self, x: Tensor, cos: Tensor, sin: Tensor, slices: list[int], windows: list[int]) -> Steps[Tensor]:
        """Patches [patches, embed] -> rows [blocks, out_features]."""
        for index, block in enumerate(self.blocks):
            is_cut = self.config.window_size and index not in self.config.full_attention_layers
            x = yield from block(x, cos, sin, windows if is_cut else slices)
        rows: Tensor = yield from self.merger(x)
        return rows

    def _order(self, grids: Sequence[_Grid], sizes: Sequence[Size]) -> Tensor | None:
        """The blocks' order for a whole group; None where all stay in their places."""
        if all(grid.order is None for grid in grids):
            return None
        blocks = [h * w // self.config.spatial_merge_size**2 for h, w in sizes]
        first = accumulate(blocks, initial=0)
        return torch.cat(
            [
                torch.arange(start, start + count, device=grid.cos.device) if grid.order is None else grid.order + start
                for grid, count, start in zip(grids, blocks, first, strict=False)
            ]
        )

    def _grid(self, size: Size, device: torch.device) -> _Grid:
        if size in self._grids:
            self._grids.move_to_end(size)
            return self._grids[size]
        cos, sin = self._angles(*size, device)
        windows, order = self._windows(*size, device)
        if order is not None:
            shape = (-1, self.config.spatial_merge_size**2, cos.shape[1])
            cos, sin = (table.view(shape)[order].view(table.shape) for table in (cos, sin))
        grid = _Grid(cos, sin, windows, order)
        if size[0] * size[1] <= MAX_ROWS:
            self._grids[size] = grid
            if len(self._grids) > CACHED_GRIDS:
                self._grids.popitem(last=False)
        return grid

    def _angles(self, lines: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [patches, head_dim / 2] of a slice: half of the frequencies count lines, half columns."""
        quarter = self.config.embed_dim // self.config.num_heads // 4
        exponents = torch.arange(0, quarter, dtype=torch.float32, device=device) / quarter
        inv_freq = 1.0 / self.config.theta**exponents
        places = self._places(lines, columns, device)
        angles = (places.unsqueeze(-1) * inv_freq).flatten(1)  # [patches, 2 * quarter]
        return angles.cos(), angles.sin()

    def _places(self, lines: int, columns: int, device: torch.device) -> Tensor:
        """int64 [patches, 2]: line and column of each patch, in block order."""
        merge = self.config.spatial_merge_size
        place = torch.arange(lines * columns, device=device).view(lines // merge, merge, columns // merge, merge)
        place = place.permute(0, 2, 1, 3).flatten()
        return torch.stack([place // columns, place % columns], dim=1)

    def _windows(self, lines: int, columns: int, device: torch.device) -> tuple[list[int], Tensor | None]:
        """(patches of each window, the blocks' order). Windows at the far edges are smaller."""
        merge = self.config.spatial_merge_size
        side = self.config.window_size // (merge * self.config.patch_size)  # blocks
        lines, columns = lines // merge, columns // merge
        if not side or max(lines, columns) <= side:
            return [lines * columns * merge**2], None
        place = torch.arange(lines * columns, device=device).view(lines, columns)
        windows = [window.flatten() for band in torch.split(place, side) for window in torch.split(band, side, dim=1)]
        return [len(window) * merge**2 for window in windows], torch.cat(windows)


class WindowedQwenVit(QwenVit):
    """The tower of the 2.5 generation: most layers attend inside windows of `window_size` pixels, RMS norms, gated
    MLPs."""

    def __init__(self, config: QwenVitConfig, out_features: int) -> None:
        super().__init__(config, out_features, norm=RMSNorm, mlp=partial(MLP, bias=True))


def _alike(slices: Sequence[Tensor]) -> list[Tensor]:
    """One tensor where all patches hold as many frames, which is nearly always; else as they are."""
    if len(slices) > 1 and len({part.shape[1] for part in slices}) == 1:
        return [torch.cat(list(slices))]
    return list(slices)
