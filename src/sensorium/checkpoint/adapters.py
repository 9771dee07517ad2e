"""A LoRA adapter's folder, as PEFT saves it: what adapter_config.json says, and what of it is served.

The tensors say which layers are adapted and with which rank; the file says by how much. What would change answers and
is not computed here is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from sensorium.checkpoint.values import read_json
from sensorium.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_PATTERN_CHARS = 512
MAX_REPEATS = 4  # of a pattern: a search takes the length of a name to this power at most
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "megatron_config": (),
    "layer_replication": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "eva_config": (),
    "corda_config": (),
    "loftq_config": (),
}
"""Settings that change what is computed -> the values with which they do not, beside null and what is empty."""
_AT_START = frozenset(
    {"eva_config", "corda_config", "loftq_config"}
)  # how training began: the base is as it was, or not


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """`target_modules` are names of layers, or None where a pattern or "all-linear" chooses them. Patterns map a name's
    end, or a regular expression of it, to a number."""

    rank: int
    alpha: float
    is_rank_stabilised: bool = False
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | None = None
    is_of_all_layers: bool = True

    def rank_of(self, module: str) -> int:
        return int(_of_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of a module's two matrices is multiplied by."""
        rank, alpha = self.rank_of(module), _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.is_rank_stabilised else rank)

    def targets(self, module: str) -> bool:
        names = self.target_modules
        return names is None or any(module == name or module.endswith(f".{name}") for name in names)


def adapter_bytes(folder: Path) -> int:
    """Of the file of its tensors; 0 where there is none: whoever loads it says what is wrong."""
    try:
        return (folder / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0


def read_adapter_config(folder: Path) -> AdapterConfig:
    """CheckpointError says in one line what is wrong, or not served."""
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: an adapter is a folder that PEFT saved")
    if not (folder / WEIGHTS_FILE).is_file():
        has_pickle = (folder / "adapter_model.bin").exists()
        advice = "; save adapter_model.bin as safetensors" if has_pickle else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}{advice}")
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise CheckpointError(f"{CONFIG_FILE}: peft_type {config.get('peft_type')!r} is not served; LORA is")
    for name, harmless in _REFUSED.items():
        value = config.get(name)
        if value and value not in harmless and not _is_usual_start(name, config):
            raise CheckpointError(
                f"{CONFIG_FILE}: {name} {_short(value)} is not served; merge the adapter into its base"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or not _is_positive(rank):
        raise CheckpointError(f"{CONFIG_FILE}: r must be a positive whole number, not {_short(rank)}")
    if not _is_number(alpha):
        raise CheckpointError(f"{CONFIG_FILE}: lora_alpha must be a number, not {_short(alpha)}")
    return AdapterConfig(
        rank,
        float(alpha),
        config.get("use_rslora") is True,
        _pattern(config, "rank_pattern"),
        _pattern(config, "alpha_pattern"),
        _target_modules(config.get("target_modules")),
        is_of_all_layers=not any(config.get(name) for name in ("layers_to_transform", "exclude_modules")),
    )


def _is_usual_start(name: str, config: Mapping[str, Any]) -> bool:
    """PEFT writes the settings of a beginning whether it was made so or not."""
    return name in _AT_START and config.get("init_lora_weights") in (True, False, None, "gaussian")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _target_modules(value: object) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise CheckpointError(f"{CONFIG_FILE}: target_modules must be a list of names or a regular expression")
    return tuple(value)


def _pattern(config: Mapping[str, Any], name: str) -> dict[str, float]:
    found = config.get(name) or {}
    if not isinstance(found, dict) or not all(_is_positive(number) for number in found.values()):
        raise CheckpointError(f"{CONFIG_FILE}: {name} must be numbers by names of layers")
    if name == "rank_pattern" and any(number != int(number) for number in found.values()):
        raise CheckpointError(f"{CONFIG_FILE}: {name} must have whole numbers")
    for key in found:
        _check_pattern(key, name)
    return found


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what may take for ever: a repeated group, or many repetitions."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if len(pattern) > MAX_PATTERN_CHARS or re.search(r"\)[*+{]", bare) or len(re.findall("[*+{]", bare)) > MAX_REPEATS:
        raise CheckpointError(f"{CONFIG_FILE}: {where}: {_short(pattern)} is too complex a regular expression")
    try:
        re.compile(pattern)
    except (re.error, RecursionError) as error:
        raise CheckpointError(f"{CONFIG_FILE}: {where}: {_short(pattern)} is no regular expression: {error}") from None


def _of_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The first that matches the name's end, from a dot on, as PEFT looks them up."""
    for pattern, number in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number
    return default
