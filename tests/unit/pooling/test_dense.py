"""Dense modules: their files in both formats, in chains, with residuals; what cannot be computed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sensorium.checkpoint.pooling import read_pooling
from sensorium.errors import CheckpointError
from sensorium.pooling.embedding import embedding_poolers
from sensorium.types import PoolingParams

SIZE = 6


def write_modules(folder: Path, *kinds: str, pooling: str = "mean") -> None:
    """Module files with the folders that sentence-transformers gives them; Dense modules have none yet."""
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if kind == "Transformer" else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules:
        (folder / module["path"]).mkdir(exist_ok=True)  # type: ignore[operator]
        if module["name"] and str(module["type"]).endswith("Pooling"):
            (folder / str(module["path"]) / "config.json").write_text(json.dumps({"pooling_mode": pooling}))


def write_dense(
    folder: Path, layer: nn.Linear, *, pickled: bool = False, extra: dict[str, Tensor] | None = None, **settings: Any
) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "bias": layer.bias is not None,
                "activation_function": "torch.nn.modules.activation.Tanh",
                **settings,
            }
        )
    )
    tensors = {f"linear.{key}": value for key, value in layer.state_dict().items()} | (extra or {})
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


def embed(folder: Path, states: Tensor, **params: Any) -> Tensor:
    with torch.device("meta"):  # as when a model is declared
        poolers, dense = embedding_poolers(folder, "cls", SIZE)
    assert all(buffer.device.type == "cpu" for buffer in dense.buffers())
    return poolers["embed"](states, PoolingParams("embed", **params), np.zeros(len(states), np.int32))


@pytest.mark.parametrize("pickled", [False, True])
@torch.inference_mode()
def test_chain(tmp_path: Path, pickled: bool) -> None:
    first, second = nn.Linear(SIZE, 5), nn.Linear(5, 3, bias=False)
    write_modules(tmp_path, "Transformer", "Pooling", "Dense", "Dense", "Normalize")
    write_dense(tmp_path / "2_Dense", first, pickled=pickled)
    write_dense(tmp_path / "3_Dense", second, pickled=pickled, activation_function="torch.nn.modules.linear.Identity")
    states = torch.randn(4, SIZE)
    raw = second(torch.tanh(first(states.mean(0))))
    torch.testing.assert_close(embed(tmp_path, states), nn.functional.normalize(raw, dim=0))
    torch.testing.assert_close(embed(tmp_path, states, normalize=False), raw)
    torch.testing.assert_close(embed(tmp_path, states, dimensions=2), nn.functional.normalize(raw[:2], dim=0))
    assert embedding_poolers(tmp_path, "cls", SIZE)[0]["embed"].size == 3


@torch.inference_mode()
def test_without_an_activation_it_is_a_tanh(tmp_path: Path) -> None:
    layer = nn.Linear(SIZE, 3)
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(tmp_path / "2_Dense", layer)
    (tmp_path / "2_Dense" / "config.json").write_text('{"in_features": 6, "out_features": 3, "bias": true}')
    states = torch.randn(4, SIZE)
    torch.testing.assert_close(embed(tmp_path, states), torch.tanh(layer(states.mean(0))))


@pytest.mark.parametrize("out_features", [SIZE, 4])
@torch.inference_mode()
def test_residual(tmp_path: Path, out_features: int) -> None:
    layer, across = nn.Linear(SIZE, out_features), torch.randn(out_features, SIZE)
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(
        tmp_path / "2_Dense",
        layer,
        use_residual=True,
        extra=None if out_features == SIZE else {"residual.weight": across},
    )
    states = torch.randn(4, SIZE)
    mean = states.mean(0)
    expected = torch.tanh(layer(mean)) + (mean if out_features == SIZE else across @ mean)
    torch.testing.assert_close(embed(tmp_path, states), expected)


@torch.inference_mode()
def test_several_poolings_feed_one_layer(tmp_path: Path) -> None:
    layer = nn.Linear(2 * SIZE, 3)
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    )
    write_dense(tmp_path / "2_Dense", layer)
    states = torch.randn(4, SIZE)
    expected = torch.tanh(layer(torch.cat([states.amax(0), states.mean(0)])))  # max stands before mean
    torch.testing.assert_close(embed(tmp_path, states), expected)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    (tmp_path / "2_Dense" / "config.json").write_text('{"in_features": 6, "out_features": 2}')
    with pytest.raises(CheckpointError, match=r"2_Dense.*has no weights"):
        embedding_poolers(tmp_path, "cls", SIZE)
    for layer, settings, extra in (
        (nn.Linear(SIZE + 1, 2), {}, {}),
        (nn.Linear(SIZE, 2, bias=False), {"bias": True}, {}),
        (nn.Linear(SIZE, 2), {"bias": False}, {}),
        (nn.Linear(SIZE, 2), {}, {"other": torch.ones(1)}),
        (nn.Linear(SIZE, 2), {"use_residual": True}, {}),
    ):
        write_dense(tmp_path / "2_Dense", layer, extra=extra, **settings)
        with pytest.raises(CheckpointError, match="2_Dense: its weights are"):
            embedding_poolers(tmp_path, "cls", SIZE)
    write_dense(tmp_path / "2_Dense", nn.Linear(SIZE, 2), activation_function="builtins.eval")
    with pytest.raises(CheckpointError, match=r"builtins\.eval"):
        embedding_poolers(tmp_path, "cls", SIZE)


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Pooling", "Normalize", "Normalize"),
    ],
)
def test_other_orders_are_refused(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    write_modules(tmp_path, *kinds)
    with pytest.raises(CheckpointError, match=" -> ".join(kinds)):
        read_pooling(tmp_path, "cls")


def test_a_dropout_changes_nothing(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Dropout", "Normalize")
    assert read_pooling(tmp_path, "cls").normalize


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b"])
def test_modules_stay_in_the_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path, "type": "x.Pooling"}]))
    with pytest.raises(CheckpointError, match="outside"):
        read_pooling(tmp_path, "cls")


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"path": ""}]', "3"])
def test_strange_module_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_pooling(tmp_path, "cls")


def test_a_dense_layer_over_tokens_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, "Transformer", "Pooling", "Dense")
    write_dense(tmp_path / "2_Dense", nn.Linear(SIZE, 2), module_input_name="token_embeddings")
    with pytest.raises(CheckpointError, match="token_embeddings"):
        read_pooling(tmp_path, "cls")
