"""Gemma 4: layers of two shapes, the last of which read other layers' keys and values; small embeddings of each token
for each layer; images and frames of any size, and audio.

A layer's shape is in its `AttentionSpec`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.configs import Checkpoint
from sensorium.checkpoint.text_config import AttentionSpec, Routing, TextConfig
from sensorium.checkpoint.values import positive_int
from sensorium.errors import CheckpointError
from sensorium.kernels.context import AttentionContext, KVCache, LayerCache, NeededStates
from sensorium.models.base import Rename, Steps
from sensorium.models.decoder import DECODER_MAP, Decoder, DecoderForCausalLM, SelfAttention, rounded, whole
from sensorium.models.experts import choose, experts_elsewhere, group_experts, make_experts
from sensorium.models.layers import MLP, Embedding, Linear, PlainNorm, RMSNorm, SmallLinear, activation_name, declare
from sensorium.models.rope import RotaryEmbedding
from sensorium.models.towers.blocks import groups, separate
from sensorium.models.towers.conformer import Conformer
from sensorium.models.towers.gemma4_vit import Gemma4VisionTower
from sensorium.parallel.ranks import Ranks
from sensorium.types import Modality

MEDIA_IDS = {"image_token_id": 258880, "video_token_id": 258884, "audio_token_id": 258881}


class Gemma4Router(nn.Module):
    """Chooses experts by states that are normed on their own."""

    def __init__(self, config: TextConfig, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.norm = PlainNorm(config.hidden_size, config.rms_norm_eps)
        self.proj = SmallLinear(config.hidden_size, routing.num_experts)
        self.scale = declare(config.hidden_size)
        self.per_expert_scale = declare(routing.num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `choose` gives, each expert's weight times its scale."""
        chosen, weights = choose(self.proj(self.norm(x) * self.scale * x.shape[1] ** -0.5), self.routing)
        return chosen, weights * self.per_expert_scale.float()[chosen]


class Gemma4Layer(nn.Module):
    """Where there are experts, they stand beside the MLP."""

    def __init__(self, config: TextConfig, spec: AttentionSpec) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = SelfAttention(config, spec)
        self.mlp = MLP(size, spec.intermediate_size, config.hidden_act, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.layer_scalar = declare(1)
        self.activation = activation_name(config.hidden_act)
        self.router = None if config.routing is None else Gemma4Router(config, config.routing)
        if config.routing is not None:
            self.experts = make_experts(config, config.routing)
            self.pre_feedforward_layernorm_2 = RMSNorm(size, eps)
            self.post_feedforward_layernorm_1 = RMSNorm(size, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.ranks: Ranks | None = None
        self.has_own_rows = bool(config.layer_embedding_size)
        if self.has_own_rows:
            self.per_layer_input_gate = Linear(size, config.layer_embedding_size)
            self.per_layer_projection = Linear(config.layer_embedding_size, size)
            self.post_per_layer_input_norm = RMSNorm(size, eps)

    def split(self, ranks: Ranks) -> list[nn.Module]:
        """Have a part of it; returns the modules that are other ranks' alone."""
        self.ranks = ranks
        self.self_attn.split(ranks)
        self.mlp.split(ranks)
        return [] if self.router is None else experts_elsewhere(self.experts, ranks)

    def forward(
        self,
        x: Tensor,
        own_rows: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache,
        context: AttentionContext,
    ) -> Tensor:
        """`own_rows` [tokens, size]: this layer's embeddings of the tokens."""
        attended = self.self_attn(self.input_layernorm(x), *rotation, cache, context)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self._inner(x))
        if own_rows is not None:
            gate = kernels.activate(self.per_layer_input_gate(x), self.activation)
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gate * own_rows))
        return x.mul_(self.layer_scalar)

    def parts(self, rotation: int) -> kernels.DecoderLayerParts | None:
        """See `DecoderLayer.parts`."""
        attention, rows, routed = self.self_attn.attention, None, self._routed_parts()
        if self.has_own_rows:
            gate, projection = self.per_layer_input_gate.packed, self.per_layer_projection.packed
            rows = kernels.TokenRowsParts(gate, projection, self.post_per_layer_input_norm.weight)
        return kernels.DecoderLayerParts(
            input_norm=self.input_layernorm.weight,
            attended_norm=self.post_attention_layernorm.weight,
            mlp_norm=self.pre_feedforward_layernorm.weight,
            gate_up=self.mlp.gate_up_proj.packed if routed is None else None,
            down=self.mlp.down_proj.packed if routed is None else None,
            routed=routed,
            after_norm=self.post_feedforward_layernorm.weight,
            rotation=rotation,
            shape=kernels.LayerShape(attention.head_dim, attention.num_kv_heads, self.self_attn.kinds),
            norms_values=self.self_attn.v_norm is not None,
            token_rows=rows,
            factor=self.layer_scalar,
            **self.self_attn.parts(),
        )

    def _routed_parts(self) -> kernels.RoutedParts | None:
        if self.router is None:
            return None
        router, routing = self.router, self.router.routing
        return kernels.RoutedParts(
            router=router.proj.packed,
            experts=self.together,
            per_token=routing.per_token,
            renormalizes=routing.renormalizes,
            scale=routing.scale,
            shared_gate_up=self.mlp.gate_up_proj.packed,
            shared_down=self.mlp.down_proj.packed,
            branches=kernels.BranchParts(
                experts_norm=self.pre_feedforward_layernorm_2.weight,
                router_norm=router.scale.float() * len(router.scale) ** -0.5,
                experts_after=self.post_feedforward_layernorm_2.weight,
                mlp_after=self.post_feedforward_layernorm_1.weight,
                shares=router.per_expert_scale.float(),
            ),
        )

    @functools.cached_property
    def together(self) -> kernels.Experts:
        return group_experts(self.experts, self.activation, self.ranks)

    def _inner(self, x: Tensor) -> Tensor:
        """MLP and experts."""
        inner: Tensor = self.mlp(self.pre_feedforward_layernorm(x))
        if self.router is None:
            return inner
        routed = self.together(self.pre_feedforward_layernorm_2(x), *self.router(x))
        out: Tensor = self.post_feedforward_layernorm_1(inner) + self.post_feedforward_layernorm_2(routed)
        return out


class Gemma4Decoder(Decoder):
    media_ids: Tensor

    def __init__(self, config: TextConfig, tied_head: Linear | None = None) -> None:
        nn.Module.__init__(self)
        size, own = config.hidden_size, config.layer_embedding_size
        self.embed_tokens = Embedding(config.vocab_size, size, tied_head)
        self.layers = nn.ModuleList(Gemma4Layer(config, spec) for spec in config.layers)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        tables = list(dict.fromkeys((spec.rope, spec.head_dim) for spec in config.layers))
        self.rotaries = nn.ModuleList(RotaryEmbedding(*table, config.max_position_embeddings) for table in tables)
        self.rotation_of = [tables.index((spec.rope, spec.head_dim)) for spec in config.layers]
        self.shape = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.scale = config.layers[0].scale
        self.activation = activation_name(config.hidden_act)
        self.is_split = False
        self.size, self.own_size = size, own
        self.pad_id = 0
        self.register_buffer("media_ids", torch.empty(0, dtype=torch.int64, device="cpu"), persistent=False)
        if own:
            self.embed_tokens_per_layer = Embedding(config.layer_vocab_size, config.num_layers * own)
            self.per_layer_model_projection = Linear(size, config.num_layers * own)
            self.per_layer_projection_norm = RMSNorm(own, config.rms_norm_eps)

    @functools.cached_property
    def stack(self) -> kernels.DecoderStack | None:
        if self.is_split:
            return None
        layers = [layer for layer in self.layers if isinstance(layer, Gemma4Layer)]
        parts = whole(layer.parts(rotation) for layer, rotation in zip(layers, self.rotation_of, strict=True))
        if parts is None:
            return None
        return kernels.decoder_stack(
            parts,
            self.norm.weight,
            num_heads=self.shape["num_heads"],
            num_kv_heads=self.shape["num_kv_heads"],
            head_dim=self.shape["head_dim"],
            scale=self.scale,
            eps=self.norm.eps,
            activation=self.activation,
        )

    def split(self, ranks: Ranks) -> list[nn.Module]:
        self.is_split = True
        self.embed_tokens.split(ranks)
        if self.own_size:
            self.embed_tokens_per_layer.split(ranks)
        return [module for layer in self.layers if isinstance(layer, Gemma4Layer) for module in layer.split(ranks)]

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache, context: AttentionContext) -> Tensor:
        rotations = [one(positions, context.long_context, context.rope_lengths) for one in self.rotaries]
        own = self._own_rows(hidden, context) if self.own_size else None
        if context.adapters is None and self.stack is not None:
            return self.stack(hidden, rotations, cache, replace(context, token_rows=own))
        each = own or [None] * len(self.layers)
        for layer, rows, place, layer_cache in zip(self.layers, each, self.rotation_of, cache, strict=True):
            hidden = layer(hidden, rows, rotations[place], layer_cache, context)
        out: Tensor = self.norm(hidden)
        return out

    def _own_rows(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
        """Of each layer, what it adds of the tokens themselves [tokens, own size]: half from a table, in which media
        are the padding token, half from the embeddings."""
        ids = context.token_ids
        if ids is None:
            raise ValueError("the batch does not say its tokens, which Gemma 4's layers look up")
        ids = torch.where(torch.isin(ids, self.media_ids), self.pad_id, ids)
        table = self.embed_tokens_per_layer(ids)
        table = table * rounded(self.own_size**0.5, table.dtype)
        shape = (len(ids), len(self.layers), self.own_size)
        projected = self.per_layer_model_projection(hidden) * self.size**-0.5
        rows: Tensor = (self.per_layer_projection_norm(projected.view(shape)) + table.view(shape)) * 2**-0.5
        return rows.unbind(1)


class Gemma4ForCausalLM(DecoderForCausalLM):
    weight_prefixes: ClassVar[Mapping[str, str]] = {"model.language_model.": "model."}
    weight_map: ClassVar[tuple[Rename, ...]] = (
        *DECODER_MAP,
        *(
            Rename(f"model.layers.{{n}}.experts.{name}", f"model.layers.{{n}}.experts.[*].{name}.weight")
            for name in ("gate_up_proj", "down_proj")
        ),
    )
    partial_states: ClassVar[NeededStates] = "all"
    decoder: ClassVar[type[Decoder]] = Gemma4Decoder
    model: Gemma4Decoder

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if not self.text.is_causal:
            raise CheckpointError("config.json: a Gemma 4 whose attention goes both ways is not supported")
        text = checkpoint.config.get("text_config") or checkpoint.config
        ids = [positive_int(checkpoint.config, name, default) for name, default in MEDIA_IDS.items()]
        self.model.media_ids = torch.tensor(ids, device="cpu")
        self.model.pad_id = text.get("pad_token_id") or 0
        shared = [i for i, spec in enumerate(self.text.layers) if spec.source is not None]
        names = [f"{part}.{kind}" for part in ("k_proj", "v_proj", "k_norm") for kind in ("weight", "bias")]
        self.ignored = (*self.ignored, *(f".layers.{i}.self_attn.{name}" for i in shared for name in names))

    def activation_bytes(self, tokens: int) -> int:
        own = 4 * self.text.num_layers * self.text.layer_embedding_size
        beside = 0 if self.text.routing is None else 4 * self.text.hidden_size  # the MLP's states, while experts work
        return super().activation_bytes(tokens) + tokens * (own + beside) * self.model.norm.weight.element_size()


class SoftEmbedder(nn.Module):
    """Rows of a tower -> rows of the decoder."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.norm = PlainNorm(inputs, eps)
        self.embedding_projection = Linear(inputs, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.embedding_projection(self.norm(rows))
        return out


class Gemma4(Gemma4ForCausalLM):
    """The larger ones have no audio tower."""

    modalities: ClassVar[frozenset[Modality]] = frozenset({"image", "video", "audio"})
    weight_prefixes: ClassVar[Mapping[str, str]] = {
        "model.language_model.": "model.",
        **{f"model.{name}.": f"{name}." for name in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")},
    }

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        vision, audio = (checkpoint.config.get(f"{kind}_config") for kind in ("vision", "audio"))
        if not isinstance(vision, dict):
            raise CheckpointError("config.json: a Gemma 4 without vision_config is not supported")
        size = self.text.hidden_size
        self.vision_tower = Gemma4VisionTower(vision)
        self.embed_vision = SoftEmbedder(self.vision_tower.size, size, self.vision_tower.eps)
        self.audio_tower = Conformer(audio) if audio else None
        if self.audio_tower is not None:
            self.embed_audio = SoftEmbedder(self.audio_tower.config.output_size, size, self.audio_tower.config.eps)
        self.ignored = (*self.ignored, "vision_tower.encoder.rotary_emb.")

    def encoding(self, kind: Modality, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        """`mel` [frames, bins] of each recording; of each image or video `pixels` [patches, 3 * side * side] from 0 to
        1 and `grid`: its frames, and the lines and columns of their patches."""
        if kind != "audio":
            return (yield from self._seen(items))
        if self.audio_tower is None:
            raise ValueError("this checkpoint has no audio tower")
        dtype = self.model.norm.weight.dtype
        heard = yield from self.audio_tower.steps([item["mel"].to(dtype) for item in items])
        return [self.embed_audio(rows) for rows in heard]

    def _seen(self, items: Sequence[Mapping[str, Tensor]]) -> Steps[list[Tensor]]:
        grids = [item["grid"].tolist() for item in items]
        sizes = [(lines, columns) for frames, lines, columns in grids for _ in range(frames)]
        patches = [lines * columns for lines, columns in sizes]
        pixels = torch.split(torch.cat([item["pixels"] for item in items]), patches)
        rows: list[Tensor] = []
        for part in groups(patches, self.vision_tower.group_rows):
            states = yield from self.vision_tower.steps(pixels[part], sizes[part])
            yield states.numel() * self.text.hidden_size
            rows.append(self.embed_vision(states))
        cells = self.vision_tower.kernel**2
        return separate(torch.cat(rows), [math.prod(grid) // cells for grid in grids])

    def activation_bytes(self, tokens: int) -> int:
        size = self.model.norm.weight.element_size()
        towers = self.vision_tower.activation_bytes(size)
        if self.audio_tower is not None:
            towers = max(towers, self.audio_tower.activation_bytes(size))
        return max(super().activation_bytes(tokens), towers)
