"""The same network as the server's, in plain torch with gradients: Qwen2.5-Omni's thinker (Qwen Team 2025).

Parameters have the checkpoint's names. It may run under autocast: what layers add to, norms and scores stay
float32. Batches are of one kind of media, in groups of equal size, so that the towers
need no masks; prompts are padded on the right, where causal attention sees nothing of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

VISION_THETA = 10000.0


class Seen(NamedTuple):
    weights: Tensor  # [looks, tokens], logarithms
    states: Tensor  # [looks, size], after the layer


class Step(NamedTuple):
    """A head that looks so many tokens back."""

    layer: int
    head: int
    back: int


Watched = Mapping[int, tuple[Tensor, Tensor]]  # of a layer: the looks' dialogs and tokens


def linear(inner: int, outer: int, *, bias: bool = False, std: float | None = None) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=bias)
    nn.init.normal_(layer.weight, std=inner**-0.5 if std is None else std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class GatedMlp(nn.Module):
    def __init__(self, size: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(size, inner, bias=bias), linear(size, inner, bias=bias)
        self.down_proj = linear(inner, size, bias=bias, std=0.3 * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, tokens, size]; cos and sin [.., tokens, size / 2] broadcast to it."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class VisionAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (linear(size, size, bias=True) for _ in range(3))
        self.proj = linear(size, size, bias=True, std=0.3 * size**-0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (part(x).view(n, tokens, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(x.shape))
        return result


class VisionBlock(nn.Module):
    def __init__(self, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(size), RMSNorm(size)
        self.attn = VisionAttention(size, heads)
        self.mlp = GatedMlp(size, inner, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Vision(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.heads, self.merge, self.side = config["num_heads"], config["spatial_merge_size"], config["patch_size"]
        self.frames = config["temporal_patch_size"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, size, (self.frames, self.side, self.side), bias=False)
        self.blocks = nn.ModuleList(
            VisionBlock(size, self.heads, config["intermediate_size"]) for _ in range(config["depth"])
        )
        block = size * self.merge**2
        self.merger = nn.Module()
        self.merger.ln_q = RMSNorm(size)
        self.merger.mlp = nn.ModuleDict(
            {"0": linear(block, block, bias=True), "2": linear(block, config["out_hidden_size"], bias=True)}
        )

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[slices, patches, 3 * frames * side²] in the server's order -> [slices, patches / merge², out]."""
        x = functional.linear(patches, self.patch_embed.proj.weight.flatten(1)).float()
        cos, sin = self.angles(*grid)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.merger.ln_q(x).reshape(len(x), -1, x.shape[-1] * self.merge**2)
        out: Tensor = self.merger.mlp["2"](functional.gelu(self.merger.mlp["0"](x)))
        return out

    def angles(self, lines: int, columns: int) -> tuple[Tensor, Tensor]:
        merge, quarter = self.merge, self.blocks[0].attn.q.out_features // self.heads // 4
        inv_freq = VISION_THETA ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
        place = torch.arange(lines * columns).view(lines // merge, merge, columns // merge, merge)
        place = place.permute(0, 2, 1, 3).flatten()
        angles = (torch.stack([place // columns, place % columns], 1).unsqueeze(-1) * inv_freq).flatten(1)
        return angles.cos(), angles.sin()


class AudioAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj = linear(size, size, bias=True), linear(size, size, bias=True)
        self.k_proj = linear(size, size)
        self.out_proj = linear(size, size, bias=True, std=0.3 * size**-0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = (
            part(x).view(n, tokens, self.heads, -1).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.out_proj(out.transpose(1, 2).reshape(x.shape))
        return result


class AudioLayer(nn.Module):
    def __init__(self, size: int, heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = AudioAttention(size, heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.fc1, self.fc2 = linear(size, inner, bias=True), linear(inner, size, bias=True, std=0.3 * inner**-0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(x))))
        return out


class Audio(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size, heads = config["d_model"], config["encoder_attention_heads"]
        self.window = 2 * config["n_window"]
        self.conv1 = nn.Conv1d(config["num_mel_bins"], size, 3, padding=1)
        self.conv2 = nn.Conv1d(size, size, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            AudioLayer(size, heads, config["encoder_ffn_dim"]) for _ in range(config["encoder_layers"])
        )
        self.ln_post = nn.LayerNorm(size)
        self.proj = linear(size, config["output_dim"], bias=True)
        step = torch.exp(-torch.log(torch.tensor(10_000.0)) / (size // 2 - 1) * torch.arange(size // 2))
        scaled = torch.arange(self.window // 2).unsqueeze(1) * step
        self.register_buffer("positions", torch.cat([scaled.sin(), scaled.cos()], 1), persistent=False)

    def forward(self, windows: Tensor, lengths: Tensor) -> Tensor:
        """Mel windows [n, bins, window] with `lengths` frames each, zero behind -> states [n, window / 2, size]."""
        half = torch.arange(self.window // 2) < ((lengths + 1) // 2).unsqueeze(1)  # [n, window / 2]
        whole = torch.arange(self.window) < lengths.unsqueeze(1)
        x = functional.gelu(self.conv1(windows)) * whole.unsqueeze(1)
        x = functional.gelu(self.conv2(x)).transpose(1, 2).float()
        x = x + self.positions
        mask = half[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def rows(self, windows: Tensor, lengths: Tensor, clips: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per clip, which names its windows in order: [rows, out]."""
        states = self.forward(windows, lengths)
        counts = ((lengths + 1) // 2).tolist()
        pairs = []
        for clip in clips:
            x = torch.cat([states[i, : counts[i]] for i in clip])
            even = len(x) // 2 * 2
            pairs.append((x[0:even:2] + x[1:even:2]) / 2)
        sizes = [len(pair) for pair in pairs]
        return list(torch.split(self.proj(self.ln_post(torch.cat(pairs))), sizes))


class Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head = size // self.heads
        self.q_proj = linear(size, self.heads * head, bias=True)
        self.k_proj, self.v_proj = (linear(size, self.kv_heads * head, bias=True) for _ in range(2))
        self.o_proj = linear(self.heads * head, size, std=0.3 * size**-0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the scores [n, heads, tokens, tokens], -inf where a token sees nothing.

        Written out: for so short prompts it is faster than the fused kernel, whose backward takes thrice as long.
        """
        n, tokens, _ = x.shape
        groups = self.heads // self.kv_heads
        q = self.q_proj(x).view(n, tokens, self.heads, -1).transpose(1, 2)
        k, v = (part(x).view(n, tokens, self.kv_heads, -1).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        q, k = rotate(q * q.shape[-1] ** -0.5, cos, sin), rotate(k, cos, sin)
        q = q.reshape(n, self.kv_heads, groups * tokens, -1)  # heads that share keys are one
        scores = (q @ k.mT).view(n, self.heads, tokens, tokens) + later(tokens)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = weights.view(n, self.kv_heads, groups * tokens, tokens) @ v
        out = out.view(n, self.heads, tokens, -1).transpose(1, 2).reshape(n, tokens, -1)
        result: Tensor = self.o_proj(out)
        return result, scores


@functools.cache
def later(tokens: int) -> Tensor:
    """[tokens, tokens]: -inf where the one to look at comes later."""
    return torch.full((tokens, tokens), -torch.inf, dtype=torch.bfloat16).triu(1)


class DecoderLayer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.self_attn = Attention(config)
        self.mlp = GatedMlp(size, config["intermediate_size"], bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The states behind the layer, and its attention's scores."""
        added, scores = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + added
        return x + self.mlp(self.post_attention_layernorm(x)), scores


class Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        rope = config["rope_parameters"]
        self.section, self.theta = rope["mrope_section"], rope["rope_theta"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"])

    def forward(
        self, x: Tensor, positions: Tensor, watched: Watched | None = None, steps: Sequence[Step] = ()
    ) -> tuple[Tensor, list[Seen], list[Tensor]]:
        """x [n, tokens, size], positions [3, n, tokens] -> hidden states [n, tokens, size], of each layer in
        `watched` what its first head looks at from some tokens, and of each of `steps` the logarithms of the weights
        [n, tokens - back] so far back."""
        half = sum(self.section)
        inv_freq = self.theta ** -(torch.arange(half, dtype=torch.float32) / half)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.section))
        angles = (positions.float().unsqueeze(-1) * inv_freq)[axis, :, :, torch.arange(half)]  # [half, n, tokens]
        angles = angles.permute(1, 2, 0).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        seen, near = [], []
        for index, layer in enumerate(self.layers):
            x, scores = layer(x, cos, sin)
            if watched and index in watched:
                seen.append(Seen(scores[:, 0][watched[index]].float().log_softmax(-1), self.norm(x[watched[index]])))
            for step in steps:
                if step.layer == index:
                    near.append(scores[:, step.head].float().log_softmax(-1).diagonal(-step.back, 1, 2))
        return self.norm(x), seen, near


class Thinker(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Decoder(config["text_config"])
        self.visual = Vision(config["vision_config"])
        self.audio_tower = Audio(config["audio_config"])

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.model.embed_tokens.weight).float()
