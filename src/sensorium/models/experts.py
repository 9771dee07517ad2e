"""MLPs that route: of many small MLPs, the experts, each token takes a few, which a linear layer chooses.

How they are chosen is data of `Routing`. Checkpoints store one tensor per expert, or those of all experts as one with
one more dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sensorium import kernels
from sensorium.checkpoint.text_config import Routing, TextConfig
from sensorium.kernels.context import Additions
from sensorium.kernels.reference.experts import by_expert
from sensorium.models.base import Rename
from sensorium.models.layers import MLP, Exact, SmallLinear, activation_name, declare
from sensorium.parallel.ranks import Ranks

_MLP = "model.layers.{n}.mlp."

EXPERT_MAP = (
    Rename("model.layers.{n}.block_sparse_moe.experts.{e}.w1.{p}", f"{_MLP}experts.{{e}}.gate_up_proj.{{p}}", "gate"),
    Rename("model.layers.{n}.block_sparse_moe.experts.{e}.w3.{p}", f"{_MLP}experts.{{e}}.gate_up_proj.{{p}}", "up"),
    Rename("model.layers.{n}.block_sparse_moe.experts.{e}.w2.{p}", f"{_MLP}experts.{{e}}.down_proj.{{p}}"),
    Rename("model.layers.{n}.block_sparse_moe.gate.{p}", f"{_MLP}gate.{{p}}"),
    Rename(f"{_MLP}experts.{{e}}.gate_proj.{{p}}", f"{_MLP}experts.{{e}}.gate_up_proj.{{p}}", "gate"),
    Rename(f"{_MLP}experts.{{e}}.up_proj.{{p}}", f"{_MLP}experts.{{e}}.gate_up_proj.{{p}}", "up"),
    Rename(f"{_MLP}experts.gate_up_proj", f"{_MLP}experts.[*].gate_up_proj.weight"),
    Rename(f"{_MLP}experts.down_proj", f"{_MLP}experts.[*].down_proj.weight"),
    Rename(f"{_MLP}shared_experts.gate_proj.{{p}}", f"{_MLP}shared_expert.gate_up_proj.{{p}}", "gate"),
    Rename(f"{_MLP}shared_experts.up_proj.{{p}}", f"{_MLP}shared_expert.gate_up_proj.{{p}}", "up"),
    Rename(f"{_MLP}shared_experts.down_proj.{{p}}", f"{_MLP}shared_expert.down_proj.{{p}}"),
    Rename(f"{_MLP}shared_expert.gate_proj.{{p}}", f"{_MLP}shared_expert.gate_up_proj.{{p}}", "gate"),
    Rename(f"{_MLP}shared_expert.up_proj.{{p}}", f"{_MLP}shared_expert.gate_up_proj.{{p}}", "up"),
)


class CorrectedRouter(Exact):
    """In float32, with the corrections of `Routing.has_correction`, which are differences of a thousandth."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = declare(num_experts, hidden_size)
        self.e_score_correction_bias = declare(num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight)


class RoutedMLP(nn.Module):
    """The experts of one layer, what chooses them, and the one that all tokens take besides, if there is one."""

    def __init__(self, config: TextConfig, routing: Routing) -> None:
        super().__init__()
        size = config.hidden_size
        self.routing = routing
        self.ranks: Ranks | None = None
        self.gate: SmallLinear | CorrectedRouter = SmallLinear(size, routing.num_experts, bias=routing.has_biases)
        if routing.has_correction:
            self.gate = CorrectedRouter(size, routing.num_experts)
        self.experts = make_experts(config, routing)
        self.shared_expert = MLP(size, routing.shared_size, config.hidden_act) if routing.shared_size else None
        self.shared_expert_gate = SmallLinear(size, 1) if routing.shared_size and routing.shared_is_gated else None
        self.activation = "clamped_swiglu" if routing.is_clamped else activation_name(config.hidden_act)

    def split(self, ranks: Ranks) -> list[nn.Module]:
        """Have some of the experts; returns the others."""
        if self.shared_expert is not None:
            self.shared_expert.split(ranks)
        self.ranks = ranks
        return experts_elsewhere(self.experts, ranks)

    @functools.cached_property
    def together(self) -> kernels.Experts:
        return group_experts(self.experts, self.activation, self.ranks)

    def parts(self) -> kernels.RoutedParts:
        shared, gate = self.shared_expert, self.shared_expert_gate
        corrected = self.gate if isinstance(self.gate, CorrectedRouter) else None
        return kernels.RoutedParts(
            router=self.gate if isinstance(self.gate, CorrectedRouter) else self.gate.packed,
            exact_router=None if corrected is None else corrected.weight,
            correction=None if corrected is None else corrected.e_score_correction_bias,
            groups=self.routing.groups,
            groups_per_token=self.routing.groups_per_token,
            experts=self.together,
            per_token=self.routing.per_token,
            renormalizes=self.routing.renormalizes,
            scale=self.routing.scale,
            shared_gate_up=None if shared is None else shared.gate_up_proj.packed,
            shared_down=None if shared is None else shared.down_proj.packed,
            shared_gate=None if gate is None else gate.packed,
        )

    def forward(self, x: Tensor, adapters: Additions | None = None) -> Tensor:
        """`adapters` add nothing here: those of experts are refused when they are loaded."""
        correction = self.gate.e_score_correction_bias if isinstance(self.gate, CorrectedRouter) else None
        chosen, weights = choose(self.gate(x), self.routing, correction)
        out = self.together(x, chosen, weights)
        if self.shared_expert is None:
            return out
        shared: Tensor = self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = shared.mul_(self.shared_expert_gate(x).sigmoid_())
        return out.add_(shared)


def make_experts(config: TextConfig, routing: Routing) -> nn.ModuleList:
    return nn.ModuleList(
        MLP(config.hidden_size, routing.expert_size, config.hidden_act, bias=routing.has_biases)
        for _ in range(routing.num_experts)
    )


def group_experts(
    experts: nn.ModuleList, activation: kernels.Activation, ranks: Ranks | None = None
) -> kernels.Experts:
    """Once their weights are there."""
    mlps = [one for one in experts if isinstance(one, MLP)]
    if ranks is not None:
        return SharedExperts(mlps, activation, ranks)
    return kernels.experts(
        [one.gate_up_proj.packed for one in mlps], [one.down_proj.packed for one in mlps], activation
    )


def experts_elsewhere(experts: nn.ModuleList, ranks: Ranks) -> list[nn.Module]:
    """Those that other ranks have."""
    first, count = ranks.fair_part(len(experts))
    return [*experts[:first], *experts[first + count :]]


class SharedExperts:
    """Experts each of which one rank has, as `kernels.Experts`: what they give is added up before it is rounded."""

    def __init__(self, every: Sequence[MLP], activation: kernels.Activation, ranks: Ranks) -> None:
        self._first, count = ranks.fair_part(len(every))
        self._here = every[self._first : self._first + count]
        self._activation, self._ranks = activation, ranks

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        starts, tokens, weights = by_expert(chosen, weights, len(self._here), self._first)
        for expert, (start, end) in zip(self._here, itertools.pairwise(starts.tolist()), strict=True):
            if start < end:
                own = tokens[start:end]
                inner = kernels.gated(expert.gate_up_proj(x[own]), self._activation)
                states = kernels.partial(expert.down_proj.packed, inner)
                out.index_add_(0, own, states * weights[start:end, None])
        return self._ranks.sum(out).to(x.dtype)


def choose(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits [tokens, experts] -> (experts of each token int64, their weights float32), [tokens, k] each.

    `correction` float32 [experts]: see `Routing.has_correction`."""
    if correction is None:
        return kernels.choose(logits, routing.per_token, renormalizes=routing.renormalizes, scale=routing.scale)
    scores = logits.float().sigmoid()
    chosen = _in_best_groups(scores + correction, routing).topk(routing.per_token, -1).indices
    weights = scores.gather(1, chosen)
    if routing.renormalizes:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights if routing.scale == 1.0 else weights * routing.scale


def _in_best_groups(scores: Tensor, routing: Routing) -> Tensor:
    """[tokens, experts], -inf outside the groups that a token takes."""
    if routing.groups == 1:
        return scores
    grouped = scores.view(len(scores), routing.groups, -1)
    best = grouped.topk(2, -1).values.sum(-1).topk(routing.groups_per_token, -1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
    inside: Tensor = grouped.masked_fill(outside.unsqueeze(2), -torch.inf)
    return inside.flatten(1)


def routed_elements(config: TextConfig, routing: Routing) -> int:
    """Elements per token that a layer holds at once, at most: where all experts are computed for all tokens that chose
    them one by one, and every token chose this one."""
    size, inner = config.hidden_size, max(routing.expert_size, routing.shared_size)
    own = 4 * size + 3 * inner  # gathered rows, their products and what they become
    sums = 2 * size  # float32, of a type of two bytes
    return own + sums + 4 * routing.num_experts + 16 * routing.per_token
