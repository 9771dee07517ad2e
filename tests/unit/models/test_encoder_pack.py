"""Encoders beside BERT and ModernBERT against transformers' classes: states, classes, other layouts of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.checkpoints import read_weights, write_weights
from support.encoder_support import VOCAB, load, pooled, prompts_of, run, save
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    GteConfig,
    GteForMaskedLM,
    GteForSequenceClassification,
    GteForTokenClassification,
    GteModel,
    JinaEmbeddingsV3Config,
    JinaEmbeddingsV3ForSequenceClassification,
    JinaEmbeddingsV3ForTokenClassification,
    JinaEmbeddingsV3Model,
    MPNetConfig,
    MPNetForSequenceClassification,
    MPNetModel,
    NomicBertConfig,
    NomicBertForSequenceClassification,
    NomicBertForTokenClassification,
    NomicBertModel,
    RobertaConfig,
    RobertaForTokenClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.errors import CheckpointError
from sensorium.models import biased
from sensorium.models.mpnet import bucket
from sensorium.types import PoolingTask

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
}
DISTILBERT = {
    **{"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCAB},
    "max_position_embeddings": 160,
}
DEBERTA = {  # v3's
    **SHAPE,
    **{"relative_attention": True, "position_buckets": 16, "max_relative_positions": -1, "share_att_key": True},
    **{"pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": False},
}
LENGTHS = [1, 7, 150, 3, 40]


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **parameters}


def deberta(**options: Any) -> Any:
    return DebertaV2Model(DebertaV2Config(**{**DEBERTA, **options}))


EMBEDDERS: dict[str, Callable[[], Any]] = {
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT)),
    "distilbert, relu": lambda: DistilBertModel(DistilBertConfig(**DISTILBERT, activation="relu")),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SHAPE)),
    "mpnet, another padding id": lambda: MPNetModel(MPNetConfig(**{**SHAPE, "pad_token_id": 3})),
    "mpnet, more buckets": lambda: MPNetModel(MPNetConfig(**SHAPE, relative_attention_num_buckets=40)),
    "nomic": lambda: NomicBertModel(NomicBertConfig(**SHAPE)),
    "nomic, gelu": lambda: NomicBertModel(NomicBertConfig(**SHAPE, hidden_act="gelu", type_vocab_size=1)),
    "nomic, wide heads": lambda: NomicBertModel(NomicBertConfig(**SHAPE, head_dim=16)),
    "nomic, theta": lambda: NomicBertModel(NomicBertConfig(**SHAPE, rope_parameters=rope("default", rope_theta=50.0))),
    "nomic, dynamic": lambda: NomicBertModel(
        NomicBertConfig(**{**SHAPE, "max_position_embeddings": 40}, rope_parameters=rope("dynamic", factor=3.0))
    ),
    "deberta v3": deberta,
    "deberta v2": lambda: deberta(conv_kernel_size=3, conv_act="gelu", conv_groups=2, type_vocab_size=2),
    "deberta, its own projections": lambda: deberta(share_att_key=False, position_biased_input=True),
    "deberta, c2p": lambda: deberta(share_att_key=False, pos_att_type=["c2p"], norm_rel_ebd="none"),
    "deberta, p2c": lambda: deberta(share_att_key=False, pos_att_type=["p2c"], position_buckets=-1),
    "deberta, near": lambda: deberta(position_buckets=-1, max_relative_positions=20),
    "deberta, far beyond the buckets": lambda: deberta(max_relative_positions=30),
    "deberta, no relative positions": lambda: deberta(relative_attention=False, position_biased_input=True),
    "deberta, no kind of relative positions": lambda: deberta(pos_att_type=None, position_biased_input=True),
    "deberta, narrow embeddings": lambda: deberta(embedding_size=24, position_biased_input=True),
    "jina": lambda: JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**SHAPE)),
    "jina, theta": lambda: JinaEmbeddingsV3Model(
        JinaEmbeddingsV3Config(**SHAPE, rope_parameters=rope("default", rope_theta=77.0))
    ),
    "gte": lambda: GteModel(GteConfig(**SHAPE)),
    "gte, no token types": lambda: GteModel(GteConfig(**SHAPE, type_vocab_size=0)),
    "gte, linear": lambda: GteModel(GteConfig(**SHAPE, rope_parameters=rope("linear", factor=2.0))),
    "gte, yarn": lambda: GteModel(
        GteConfig(**SHAPE, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=40))
    ),
}
CLASSIFIERS: dict[str, Callable[[int], Any]] = {
    "distilbert": lambda n: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT, num_labels=n)),
    "mpnet": lambda n: MPNetForSequenceClassification(MPNetConfig(**SHAPE, num_labels=n)),
    "nomic": lambda n: NomicBertForSequenceClassification(NomicBertConfig(**SHAPE, num_labels=n)),
    "deberta": lambda n: DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA, num_labels=n)),
    "deberta, tanh": lambda n: DebertaV2ForSequenceClassification(
        DebertaV2Config(**{**DEBERTA, "relative_attention": False}, num_labels=n, pooler_hidden_act="tanh")
    ),
    "jina": lambda n: JinaEmbeddingsV3ForSequenceClassification(JinaEmbeddingsV3Config(**SHAPE, num_labels=n)),
    "gte": lambda n: GteForSequenceClassification(GteConfig(**SHAPE, num_labels=n)),
}
TOKEN_CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForTokenClassification(BertConfig(**SHAPE, num_labels=5)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**SHAPE, num_labels=5)),
    "distilbert": lambda: DistilBertForTokenClassification(DistilBertConfig(**DISTILBERT, num_labels=5)),
    "deberta": lambda: DebertaV2ForTokenClassification(DebertaV2Config(**DEBERTA, num_labels=5)),
    "jina": lambda: JinaEmbeddingsV3ForTokenClassification(JinaEmbeddingsV3Config(**SHAPE, num_labels=5)),
    "gte": lambda: GteForTokenClassification(GteConfig(**SHAPE, num_labels=5)),
    "nomic": lambda: NomicBertForTokenClassification(NomicBertConfig(**SHAPE, num_labels=5)),
}


def edit_config(folder: Path, **changes: Any) -> None:
    """None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@torch.inference_mode()
def check_states(oracle: Any, folder: Path) -> None:
    """All tokens', and the first ones' where no others are computed."""
    model, prompts = load(folder), prompts_of(LENGTHS)
    first = run(model, prompts, needed_states="first")
    for ids, states, only in zip(prompts, run(model, prompts), first, strict=True):
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(only[0], expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_states(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biased, "BIAS_ELEMENTS", 20_000)  # a long run's queries in several parts
    check_states(save(EMBEDDERS[name](), tmp_path), tmp_path)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("labels", [1, 3])
@torch.inference_mode()
def test_classifiers(tmp_path: Path, name: str, labels: int) -> None:
    oracle = save(CLASSIFIERS[name](labels), tmp_path)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    assert set(model.poolers) == ({"classify", "score"} if labels == 1 else {"classify"})
    for ids, states in zip(prompts, run(model, prompts, needed_states="first"), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(
            pooled(model, "classify", states, ids, activation=False), logits, atol=2e-5, rtol=1e-5
        )
        expected = logits.sigmoid() if labels == 1 else logits.softmax(-1)
        torch.testing.assert_close(pooled(model, "classify", states, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TOKEN_CLASSIFIERS)
@torch.inference_mode()
def test_token_classifiers(tmp_path: Path, name: str) -> None:
    oracle = save(TOKEN_CLASSIFIERS[name](), tmp_path)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    assert set(model.poolers) == {"token_classify"}
    for ids, states in zip(prompts, run(model, prompts), strict=True):
        logits = oracle(ids.unsqueeze(0)).logits[0]
        raw = pooled(model, "token_classify", states, ids, activation=False)
        torch.testing.assert_close(raw, logits, atol=2e-5, rtol=1e-5)
        scores = pooled(model, "token_classify", states, ids)
        torch.testing.assert_close(scores, logits.softmax(-1), atol=1e-5, rtol=1e-5)


def test_masked_language_models_embed(tmp_path: Path) -> None:
    distilbert, gte = tmp_path / "distilbert", tmp_path / "gte"
    check_states(save(DistilBertForMaskedLM(DistilBertConfig(**DISTILBERT)), distilbert).distilbert, distilbert)
    check_states(save(DebertaV2ForMaskedLM(DebertaV2Config(**DEBERTA)), tmp_path).deberta, tmp_path)
    check_states(save(GteForMaskedLM(GteConfig(**SHAPE)), gte).gte, gte)


def test_prefixed_as_another_model_stores_it(tmp_path: Path) -> None:
    oracle = save(MPNetModel(MPNetConfig(**SHAPE)), tmp_path)
    write_weights(tmp_path, {f"mpnet.{key}": value for key, value in read_weights(tmp_path).items()})
    check_states(oracle, tmp_path)


def test_names_of_distilberts_config(tmp_path: Path) -> None:
    """transformers takes BERT's names of the same things too."""
    oracle = save(EMBEDDERS["distilbert"](), tmp_path)
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    stated = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, **dict.fromkeys(names), **{new: stated[old] for old, new in names.items()})
    check_states(oracle, tmp_path)


NOMIC_ON_THE_HUB: dict[str, Any] = {
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 160, "vocab_size": VOCAB},
    **{"activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "rotary_emb_fraction": 1.0},
    **{"rotary_emb_base": 50, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None},
    **{"rotary_scaling_factor": None, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False},
    **{"prenorm": False, "parallel_block": False, "use_rms_norm": False, "causal": False, "type_vocab_size": 2},
    **{"pad_vocab_size_multiple": 8, "max_trained_positions": 40, "architectures": ["NomicBertModel"]},
}


@pytest.mark.parametrize("factor", [None, 3.0])
def test_nomic_as_on_the_hub(tmp_path: Path, factor: float | None) -> None:
    """Beyond the positions that it was trained with, too."""
    parameters = rope("default" if factor is None else "dynamic", rope_theta=50.0, factor=factor or 1.0)
    config = NomicBertConfig(**{**SHAPE, "max_position_embeddings": 40}, rope_parameters=parameters)
    oracle = save(NomicBertModel(config), tmp_path)
    hub = {**NOMIC_ON_THE_HUB, "vocab_size": VOCAB - 5, "rotary_scaling_factor": factor}  # the table is padded
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert open_checkpoint(tmp_path).max_model_len == 160
    check_states(oracle, tmp_path)


@torch.inference_mode()
def test_experts(tmp_path: Path) -> None:
    """v2's: of every token's softmax the two largest shares, not made to sum to one. Against all experts computed for
    every token."""
    experts, size, inner = 8, 32, 48
    save(NomicBertModel(NomicBertConfig(**SHAPE, type_vocab_size=1)), tmp_path)
    weights = {key: value for key, value in read_weights(tmp_path).items() if ".mlp." not in key}
    for layer in range(2):
        own = f"encoder.layers.{layer}."
        weights |= {f"{own}attn.Wqkv.bias": torch.randn(3 * size), f"{own}attn.out_proj.bias": torch.randn(size)}
    dense, routed = "encoder.layers.0.mlp.", "encoder.layers.1.mlp."
    weights |= {f"{dense}fc1.weight": torch.randn(inner, size) * 0.3, f"{dense}fc1.bias": torch.randn(inner)}
    weights |= {f"{dense}fc2.weight": torch.randn(size, inner) * 0.3, f"{dense}fc2.bias": torch.randn(size)}
    router, bias = torch.randn(experts, size) * 0.3, torch.randn(size)
    w1, w2 = (torch.randn(experts * inner, size) * 0.3 for _ in range(2))
    weights |= {f"{routed}router.layer.weight": router, f"{routed}experts.bias": bias}
    write_weights(tmp_path, {**weights, f"{routed}experts.mlp.w1": w1, f"{routed}experts.mlp.w2": w2})
    hub = {"activation_function": "gelu", "qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True}
    hub |= {"num_experts": experts, "moe_top_k": 2, "moe_every_n_layers": 2, "type_vocab_size": 1}
    (tmp_path / "config.json").write_text(
        json.dumps({**NOMIC_ON_THE_HUB, **hub, "moe_normalize_expert_weights": False})
    )
    model = load(tmp_path)
    x = torch.randn(50, size)
    shares = (x @ router.t()).softmax(-1)
    kept = shares * (shares >= shares.topk(2).values[:, -1:])
    each = [torch.nn.functional.gelu(x @ a.t()) @ b for a, b in zip(w1.split(inner), w2.split(inner), strict=True)]
    expected = (kept.t().unsqueeze(-1) * torch.stack(each)).sum(0) + bias
    torch.testing.assert_close(cast(Any, model.encoder).layer[1].mlp(x), expected, atol=1e-4, rtol=1e-5)
    prompts = prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(model, prompts), strict=True):  # together as alone
        torch.testing.assert_close(states, run(model, [ids])[0], atol=2e-5, rtol=1e-5)


def test_gte_as_on_the_hub(tmp_path: Path) -> None:
    """Separate or joined q, k and v; its own kind of stretched positions, by its formula."""
    oracle = save(GteModel(GteConfig(**SHAPE, rope_parameters=rope("default", rope_theta=500.0))), tmp_path)
    factor, dim = 2.0, 8
    oracle.rotary_emb.inv_freq = (500.0 * factor) ** (-torch.arange(0, dim, 2) / dim) / factor ** (2 / dim)
    weights = read_weights(tmp_path)
    assert {key.partition(".")[0] for key in weights} <= {"new", "gte", "embeddings", "encoder"}
    for key in [key for key in weights if ".attention.qkv_proj." in key]:
        for name, part in zip("qkv", weights.pop(key).chunk(3), strict=True):
            weights[key.replace("qkv_proj", f"{name}_proj")] = part.clone()
    write_weights(tmp_path, weights)
    edit_config(
        tmp_path,
        architectures=["NewModel"],
        rope_parameters=None,
        rope_theta=500,
        rope_scaling={"type": "ntk", "factor": factor},
        **{"layer_norm_type": "layer_norm", "position_embedding_type": "rope", "logn_attention_scale": False},
    )
    check_states(oracle, tmp_path)


TASKS = ["retrieval.query", "retrieval.passage", "text-matching"]
RANK, ALPHA = 4, 3.0


def adapted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as the hub's jina-embeddings-v3 has them, with adapters of every product and table."""
    made = {}
    for key, value in weights.items():
        stem, _, kind = key.rpartition(".")
        if value.dim() < 2 or kind != "weight":
            made[f"roberta.{key}"] = value
            continue
        shapes = (len(TASKS), RANK, value.shape[1]), (len(TASKS), value.shape[0], RANK)
        if "embeddings" in key:
            shapes = (len(TASKS), value.shape[0], RANK), (len(TASKS), RANK, value.shape[1])
        made[f"roberta.{stem}.parametrizations.weight.original"] = value
        for name, shape in zip("AB", shapes, strict=True):
            made[f"roberta.{stem}.parametrizations.weight.0.lora_{name}"] = torch.randn(shape) * 0.3
    return made


def merged(weights: dict[str, torch.Tensor], task: int | None) -> dict[str, torch.Tensor]:
    """Plain weights with one task's adapters in them, by the published rule."""
    plain = {}
    for key, value in weights.items():
        if ".lora_" in key:
            continue
        name = key.removeprefix("roberta.").replace(".parametrizations.weight.original", ".weight")
        plain[name] = value
        if key.endswith(".original") and task is not None:
            a, b = (weights[key.replace("original", f"0.lora_{kind}")][task] for kind in "AB")
            plain[name] = value + (a @ b if "embeddings" in key else b @ a) * (ALPHA / RANK)
    return plain


@torch.inference_mode()
def test_adapters_of_jina(tmp_path: Path) -> None:
    """Each prompt by its own task or by none, all in one step; also where only the first tokens are computed."""
    save(JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**SHAPE)), tmp_path)
    weights = adapted(read_weights(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    write_weights(tmp_path, weights)
    hub = {"architectures": ["XLMRobertaModel"], "position_embedding_type": "rotary", "rotary_emb_base": 20_000.0}
    edit_config(tmp_path, rope_parameters=None, **hub, lora_adaptations=TASKS, lora_rank=RANK, lora_alpha=ALPHA)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    chosen = [None, 0, 2, 1, None]
    types = [
        torch.full((len(ids),), 0 if task is None else task + 1) for ids, task in zip(prompts, chosen, strict=True)
    ]
    together = run(model, prompts, types), run(model, prompts, types, needed_states="first")
    for index, (ids, task) in enumerate(zip(prompts, chosen, strict=True)):
        oracle = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**config)).eval()
        oracle.load_state_dict(_as_loaded(oracle, merged(weights, task), tmp_path / str(index)))
        expected = oracle(ids.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(together[0][index], expected, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(together[1][index][0], expected[0], atol=5e-5, rtol=1e-4)


FLASH = {
    "attention.output.dense": "mixer.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "output.LayerNorm": "norm2",
}


@torch.inference_mode()
def test_jinas_reranker(tmp_path: Path) -> None:
    """jina-reranker-v2: XLM-RoBERTa with its table of positions, in the files of jina's own code."""
    shape = {**SHAPE, "max_position_embeddings": 162, "type_vocab_size": 1}
    oracle = save(XLMRobertaForSequenceClassification(XLMRobertaConfig(**shape, num_labels=1)), tmp_path)
    plain = read_weights(tmp_path)
    made = {}
    for key, value in plain.items():
        stem, _, kind = key.rpartition(".")
        layer, _, part = stem.partition("encoder.layer.")
        number, _, part = part.partition(".")
        if part == "attention.self.query":
            parts = [plain[key.replace("query", name)] for name in ("query", "key", "value")]
            made[f"roberta.encoder.layers.{number}.mixer.Wqkv.{kind}"] = torch.cat(parts)
        elif part in FLASH:
            made[f"{layer}encoder.layers.{number}.{FLASH[part]}.{kind}"] = value
        elif not part:
            made[key.replace("embeddings.LayerNorm", "emb_ln")] = value
    write_weights(tmp_path, made)
    edit_config(tmp_path, position_embedding_type="absolute", use_flash_attn=True, emb_pooler=None)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    for ids, states in zip(prompts, run(model, prompts, needed_states="first"), strict=True):
        expected = oracle(ids.unsqueeze(0)).logits[0].sigmoid()
        torch.testing.assert_close(pooled(model, "score", states, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
@torch.inference_mode()
def test_rotary_classifiers_under_xlm_robertas_name(tmp_path: Path, kind: str) -> None:
    """As jina's own code saves what was trained from jina-embeddings-v3."""
    head = {"Sequence": JinaEmbeddingsV3ForSequenceClassification, "Token": JinaEmbeddingsV3ForTokenClassification}
    oracle = save(head[kind](JinaEmbeddingsV3Config(**SHAPE, num_labels=3)), tmp_path)
    names = {"architectures": [f"XLMRobertaFor{kind}Classification"], "model_type": "xlm-roberta"}
    edit_config(tmp_path, **names, position_embedding_type="rotary", rotary_emb_base=20_000.0, rope_parameters=None)
    model, prompts = load(tmp_path), prompts_of(LENGTHS)
    task: PoolingTask = "classify" if kind == "Sequence" else "token_classify"
    for ids, states in zip(prompts, run(model, prompts), strict=True):
        expected = oracle(ids.unsqueeze(0)).logits[0].softmax(-1)
        torch.testing.assert_close(pooled(model, task, states, ids), expected, atol=1e-5, rtol=1e-5)


def _as_loaded(oracle: Any, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Stored names -> the class's own."""
    oracle.save_pretrained(folder)
    write_weights(folder, weights)
    return type(oracle).from_pretrained(folder).state_dict()


def test_buckets_of_distances() -> None:
    """Distances and rows as transformers' MPNet has them."""
    rows = {-100: 15, -64: 14, -20: 10, -16: 10, -9: 8, -8: 8, -7: 7, -1: 1, 0: 0, 1: 17, 8: 24, 15: 25, 20: 26}
    rows |= {64: 30, 128: 31}
    assert dict(zip(rows, bucket(torch.tensor(list(rows))).tolist(), strict=True)) == rows


@pytest.mark.parametrize(
    ("name", "length"), [("distilbert", 160), ("mpnet", 158), ("mpnet, another padding id", 158), ("gte", 160)]
)
def test_lengths(tmp_path: Path, name: str, length: int) -> None:
    save(EMBEDDERS[name](), tmp_path)
    assert open_checkpoint(tmp_path).max_model_len == length


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets"),
        ("mpnet", {"num_attention_heads": 5}, "5 attention heads"),
        ("distilbert", {"dim": "wide"}, "hidden_size"),
        ("distilbert", {"activation": "mish"}, "mish"),
        ("nomic", {"prenorm": True}, "prenorm"),
        ("nomic", {"rotary_emb_fraction": 0.0}, "rotary_emb_fraction"),
        ("nomic", {"activation_function": "glu"}, "glu"),
        ("nomic", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ("deberta v3", {"pos_att_type": "p2c|p2p"}, "pos_att_type"),
        ("deberta v2", {"conv_groups": 3}, "conv_groups"),
        ("gte", {"position_embedding_type": "absolute"}, "position_embedding_type"),
        ("gte", {"logn_attention_scale": True}, "logn_attention_scale"),
        ("gte", {"rope_parameters": None, "rope_scaling": {"type": "ntk", "mixed_b": 0.5}}, "mixed_b"),
    ],
)
def test_what_it_cannot_compute_is_refused(tmp_path: Path, name: str, changes: dict[str, Any], said: str) -> None:
    save(EMBEDDERS[name](), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)
