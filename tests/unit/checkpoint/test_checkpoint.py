"""Reading a model folder: both config dialects say the same, defaults are the families', every error is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import checkpoints

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.hub import resolve
from sensorium.checkpoint.text_config import AttentionSpec, RopeConfig, TextConfig
from sensorium.checkpoint.weight_files import find_weight_files
from sensorium.errors import CheckpointError, StartupError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "llava", "llava_next", "qwen2_vl")

# config.json of published repositories, as models.md records them
LLAVA_15 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_feature_layer": -2,
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
}
LLAVA_NEXT_34B = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_token_index": 64000,
    "torch_dtype": "float16",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000000.0,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "vocab_size": 64064,
    },
}
QWEN2_VL_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_config": {"hidden_size": 1536, "in_chans": 3},
}
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
}
PHI_35_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "auto_map": {"AutoModel": "modeling_phi3.Phi3"},
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    (folder / "model.safetensors").touch()
    for name, value in {"config.json": config, **files}.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def text_of(folder: Path, config: dict[str, Any]) -> TextConfig:
    text = open_checkpoint(write(folder, config)).text
    assert text is not None
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_say_the_same(family: str, tmp_path: Path) -> None:
    found = []
    for layout in ("hub", "transformers"):
        getattr(checkpoints, f"make_{family}")(tmp_path / layout, layout)
        found.append(open_checkpoint(tmp_path / layout))
    hub, own = found
    assert hub.text is not None
    assert own.text is not None
    assert {**_fields(hub.text), "model_type": ""} == {**_fields(own.text), "model_type": ""}
    for name in ("architecture", "preprocessor", "chat_template", "dtype", "max_model_len", "vocab_size"):
        assert getattr(hub, name) == getattr(own, name), name
    assert set(hub.stop_token_ids) == set(own.stop_token_ids)
    assert hub.chat_template


def _fields(text: TextConfig) -> dict[str, Any]:
    return {name: getattr(text, name) for name in TextConfig.__dataclass_fields__}


def test_llava_15_leaves_out_llamas_defaults(tmp_path: Path) -> None:
    assert text_of(tmp_path, LLAVA_15) == TextConfig(
        model_type="llama",
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=RopeConfig(original_max_positions=4096),
        max_len=4096,
        layers=(AttentionSpec(RopeConfig(original_max_positions=4096), 128**-0.5),) * 32,
    )
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.dtype, checkpoint.max_model_len, checkpoint.vocab_size) == ("float16", 4096, 32064)


def windows(text: TextConfig) -> set[int | None]:
    return {layer.window for layer in text.layers}


def test_llava_next_34b(tmp_path: Path) -> None:
    text = text_of(tmp_path, LLAVA_NEXT_34B)
    assert (text.num_layers, text.num_heads, text.num_kv_heads, text.head_dim) == (60, 56, 8, 128)
    assert text.rope.theta == 5e6
    assert open_checkpoint(tmp_path).stop_token_ids == (7,)


@pytest.mark.parametrize("kind", [{"type": "mrope"}, {"rope_type": "default", "type": "default"}])
def test_qwen2_vl_2b_is_flat(tmp_path: Path, kind: dict[str, str]) -> None:
    config = {**QWEN2_VL_2B, "rope_scaling": {**kind, "mrope_section": [16, 24, 24]}}
    text = text_of(tmp_path, config)
    assert text.rope == RopeConfig(theta=1e6, original_max_positions=32768, mrope_section=(16, 24, 24))
    assert (text.head_dim, windows(text)) == (128, {None})
    assert text.attention_bias
    assert text.tie_word_embeddings


def test_llama_32(tmp_path: Path) -> None:
    text = text_of(tmp_path, LLAMA_32_1B)
    assert text.rope == RopeConfig(theta=500000.0, kind="llama3", factor=32.0, original_max_positions=8192)
    assert open_checkpoint(tmp_path).stop_token_ids == (128001, 128008, 128009)


def test_phi_35(tmp_path: Path) -> None:
    text = text_of(tmp_path, PHI_35_MINI)
    assert (text.rope.kind, text.rope.factor, text.rope.original_max_positions) == ("longrope", 32.0, 4096)
    assert windows(text) == {None}  # wider than any sequence
    assert text.head_dim == 96


def test_defaults_of_families(tmp_path: Path) -> None:
    mistral = text_of(tmp_path, {"architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    assert (mistral.num_kv_heads, mistral.intermediate_size, windows(mistral)) == (8, 14336, {4096})
    unbounded = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    assert windows(text_of(tmp_path, unbounded)) == {None}
    qwen3 = text_of(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias, windows(qwen3)) == (128, True, False, {None})
    windowed = text_of(
        tmp_path,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": 30,
            "use_sliding_window": True,
            "sliding_window": 100,
        },
    )
    assert [layer.window for layer in windowed.layers] == [None] * 28 + [100] * 2
    linear = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    assert open_checkpoint(write(tmp_path, linear)).max_model_len == 16384


def overridden(folder: Path, config: dict[str, Any], overrides: dict[str, Any]) -> Checkpoint:
    return open_checkpoint(write(folder, config), overrides=overrides)


def test_overrides_stand_in_the_place_of_config_json(tmp_path: Path) -> None:
    found = overridden(
        tmp_path,
        LLAMA_32_1B,
        {
            "max_position_embeddings": 777,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    )
    assert found.text is not None
    assert (found.text.rope.kind, found.text.rope.factor, found.max_model_len) == ("linear", 4.0, 4 * 777)
    assert not found.text.tie_word_embeddings
    assert found.text.rope.theta == LLAMA_32_1B["rope_theta"]
    plain = overridden(tmp_path, LLAMA_32_1B, {"rope_scaling": None, "is_matryoshka": True})
    assert plain.text is not None
    assert plain.text.rope.kind == "default"
    assert plain.config["is_matryoshka"] is True
    assert overridden(tmp_path, LLAMA_32_1B, {"architectures": ["LlamaForSequenceClassification"]}).architecture == (
        "LlamaForSequenceClassification"
    )


def test_overrides_go_where_the_decoder_s_part_is(tmp_path: Path) -> None:
    for overrides in (
        {"max_position_embeddings": 99, "rope_theta": 5.0},
        {"text_config": {"max_position_embeddings": 99, "rope_theta": 5.0}},
    ):
        found = overridden(tmp_path, LLAVA_15, overrides).text
        assert found is not None
        assert (found.max_position_embeddings, found.rope.theta) == (99, 5.0)
        assert found.vocab_size == 32064  # the rest stays
    omni = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": {"text_config": {"vocab_size": 1000}},
    }
    more: tuple[dict[str, Any], ...] = (
        {"max_position_embeddings": 99},
        {"thinker_config": {"text_config": {"max_position_embeddings": 99}}},
    )
    for overrides in more:
        assert overridden(tmp_path, omni, overrides).max_model_len == 99


def test_overrides_speak_both_dialects_of_rope(tmp_path: Path) -> None:
    newer = {**LLAMA_32_1B, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}
    del newer["rope_scaling"]
    linear = overridden(tmp_path, newer, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}).text
    other = overridden(tmp_path, newer, {"rope_theta": 9.0}).text
    assert linear is not None
    assert other is not None
    assert (linear.rope.kind, linear.rope.factor, linear.rope.theta) == ("linear", 2.0, 1234.0)
    assert (other.rope.kind, other.rope.theta) == ("default", 9.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_experts_per_token": 5}, "--hf-overrides: num_experts_per_token"),
        ({"text_config": {"wings": 2}}, "--hf-overrides: text_config.wings"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_overrides_that_cannot_be_honoured(tmp_path: Path, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(StartupError, match=re.escape(said)):
        overridden(tmp_path, LLAVA_15 if "text_config" in overrides else LLAMA_32_1B, overrides)


def test_generation_config_names_the_stops(tmp_path: Path) -> None:
    folder = write(tmp_path, QWEN2_VL_2B, **{"generation_config.json": {"eos_token_id": [151645, 151643]}})
    assert open_checkpoint(folder).stop_token_ids == (151645, 151643)


def test_special_tokens_that_end_a_turn_are_stops(tmp_path: Path) -> None:
    tokens = {
        "151643": {"content": "<|endoftext|>"},
        "151655": {"content": "<|image_pad|>"},
        "999999": {"content": "</s>"},
    }
    folder = write(tmp_path, QWEN2_VL_2B, **{"tokenizer_config.json": {"added_tokens_decoder": tokens}})
    assert open_checkpoint(folder).stop_token_ids == (151645, 151643)
    listed = [{"id": 151644, "content": "<|im_start|>"}, {"id": 151643, "content": "<|endoftext|>"}]
    folder = write(tmp_path, QWEN2_VL_2B, **{"tokenizer_config.json": {}, "tokenizer.json": {"added_tokens": listed}})
    assert open_checkpoint(folder).stop_token_ids == (151645, 151643)


def test_where_chat_templates_are(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    folder = write(tmp_path, LLAMA_32_1B)
    assert open_checkpoint(folder).chat_template is None
    write(folder, LLAMA_32_1B, **{"tokenizer_config.json": {"chat_template": named}})
    assert open_checkpoint(folder).chat_template == "listed"
    assert open_checkpoint(folder).tool_template == "tools"
    write(folder, LLAMA_32_1B, **{"tokenizer_config.json": {"chat_template": "plain"}})
    assert open_checkpoint(folder).chat_template == "plain"
    assert open_checkpoint(folder).tool_template is None
    write(folder, LLAMA_32_1B, **{"chat_template.json": {"chat_template": "own file"}})
    assert open_checkpoint(folder).chat_template == "own file"
    write(folder, LLAMA_32_1B, **{"chat_template.jinja": "newest"})
    assert open_checkpoint(folder).chat_template == "newest"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools too")
    assert (open_checkpoint(folder).chat_template, open_checkpoint(folder).tool_template) == ("newest", "tools too")


def test_preprocessor_inside_the_processor_file(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAVA_15, **{"processor_config.json": {"image_processor": {"size": 3}, "patch_size": 14}})
    assert open_checkpoint(folder).preprocessor == {"size": 3}
    write(folder, LLAVA_15, **{"preprocessor_config.json": {"size": 4}})
    assert open_checkpoint(folder).preprocessor == {"size": 4}


def test_remote_code_is_never_imported(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write(tmp_path, PHI_35_MINI, **{"modeling_phi3.py": f"open({str(canary)!r}, 'w')"})
    assert open_checkpoint(folder).architecture == "Phi3ForCausalLM"
    assert not canary.exists()


def changed(**changes: Any) -> dict[str, Any]:
    return {**LLAMA_32_1B, **changes}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(architectures=["Falcon"]), "architecture Falcon is not supported; supported are LlamaForCausalLM, "),
        (changed(architectures=[]), "architectures"),
        (changed(architectures="LlamaForCausalLM"), "architectures"),
        (changed(model_type="falcon"), "'falcon' is not supported; supported are llama"),
        (changed(hidden_act="os.system"), "'os.system' is not supported; supported are silu"),
        (changed(hidden_act="__import__('os')"), "hidden_act"),
        (changed(hidden_size=0), "hidden_size must be a positive integer"),
        (changed(hidden_size="big"), "hidden_size must be a positive integer"),
        (changed(num_hidden_layers=True), "num_hidden_layers"),
        (changed(num_attention_heads=7, head_dim=64), "7 heads do not divide among 8"),
        (changed(rms_norm_eps="small"), "rms_norm_eps must be a number"),
        (changed(torch_dtype="float8"), "'float8' is not supported; supported are bfloat16"),
        (changed(rope_scaling={"rope_type": "spiral"}), "'spiral' is not supported; supported are default"),
        (changed(rope_scaling=[3]), "rope_scaling must be an object"),
        (changed(rope_scaling={"type": "mrope", "mrope_section": [1, 2]}), "mrope_section [1, 2] must add up to 32"),
        (changed(rope_scaling={"type": "longrope", "short_factor": [1], "long_factor": [1]}), "of 32 numbers each"),
        (changed(rope_theta=-1), "must be positive"),
        (changed(eos_token_id=["</s>"]), "eos_token_id"),
        (changed(quantization_config={"quant_method": "aqlm"}), "quantisation by aqlm"),
    ],
)
def test_bad_configs(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path, config))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul\0", '{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_that_are_not_json_objects(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, LLAMA_32_1B)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    write(tmp_path, LLAMA_32_1B)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, "not there"),
        ({"weight_map": {"a": "../model.safetensors"}}, "strange file"),
        ({"weight_map": {"a": "/etc/passwd"}}, "strange file"),
        ({"weight_map": {"a": 3}}, "strange file"),
        ({"weight_map": {}}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_bad_index(tmp_path: Path, index: dict[str, Any], said: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, LLAMA_32_1B, **{"model.safetensors.index.json": index})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


def test_resolve_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model") == Path("org/model")  # a folder wins over the hub
    for missing in (str(tmp_path / "nothing"), "./nothing", "~nobody/x/y", "a/b/c", ""):
        with pytest.raises(StartupError, match="no such folder"):
            resolve(missing)


def hub_cache(root: Path, commits: dict[str, str]) -> Path:
    """The hub's cache folder with one repository: revision name -> commit."""
    repository = root / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in commits.items():
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        write(repository / "snapshots" / commit, {"architectures": [commit]})
    return root


def test_resolve_takes_every_file_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commits = {"main": "a" * 40, "v2": "b" * 40}
    cache = hub_cache(tmp_path, commits)
    for revision, commit in ((None, "a" * 40), ("v2", "b" * 40), ("b" * 40, "b" * 40)):
        folder = resolve("org/model", revision, str(cache))
        assert folder.name == commit
        assert json.loads((folder / "config.json").read_text())["architectures"] == [commit]


def test_pickled_weights_come_from_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = tmp_path / ("c" * 40), []
    folder.mkdir()

    def snapshot_download(**options: Any) -> Any:
        calls.append(options)
        return [] if options.get("dry_run") else str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("org/model", "v2") == folder
    for asks in (
        [call for call in calls if call.get("local_files_only")],
        [call for call in calls if call.get("local_files_only") is False],
    ):
        assert [call["revision"] for call in asks] == ["v2", "c" * 40]
        assert not any(pattern.endswith(".bin") for pattern in asks[0]["allow_patterns"])
        assert "pytorch_model*.bin" in asks[1]["allow_patterns"]


def test_offline_without_a_copy_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match="not downloaded yet") as caught:
        resolve("org/other", None, str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(StartupError, match="revision v9"):
        resolve("org/model", "v9", str(hub_cache(tmp_path, {"main": "a" * 40})))


def test_reading_a_checkpoint_needs_no_torch(tmp_path: Path) -> None:
    checkpoints.make_qwen2_vl(tmp_path)
    code = (
        "import sys; from pathlib import Path; from sensorium.checkpoint.configs import open_checkpoint;"
        "from sensorium.checkpoint.hub import resolve;"
        f"open_checkpoint(resolve({str(tmp_path)!r}));"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weight_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A hub's folder whose blobs are gone, and a folder in a file's place."""
    file = tmp_path / "model.safetensors"
    file.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to what is not there"):
        find_weight_files(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no file"):
        find_weight_files(tmp_path)
