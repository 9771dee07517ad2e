"""Several models: on the command line, in a TOML file, in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensorium.cli.main import main, parser, serve_plan
from sensorium.config import ServePlan
from sensorium.errors import StartupError

FILE = """
memory = "24GB"
host = "0.0.0.0"
api-key = ["one", "two"]
threads = 2

[models.chat]
model = "Qwen/Qwen2-VL-2B-Instruct"
quantization = "int8"
limit_mm_per_prompt = { image = 4 }
aliases = ["gpt-4o", "llava"]
pinned = true

[models."BAAI/bge-m3"]
lazy = true
idle-unload-s = 90
max_model_len = 512
"""


def plan_of(*argv: str, **environment: str) -> ServePlan:
    words = ["serve", *argv]
    return serve_plan(parser().read(words), environment, words)


def written(folder: Path, text: str) -> str:
    (folder / "models.toml").write_text(text)
    return str(folder / "models.toml")


def test_models_on_the_command_line_share_its_flags() -> None:
    plan = plan_of("a", "b/c", "--dtype", "float32", "--memory", "2GiB")
    assert [options.model for options in plan.models] == ["a", "b/c"]
    assert {options.engine.dtype for options in plan.models} == {"float32"}
    assert plan.common.server.memory == 2 << 30
    assert [options.model for options in plan_of().models] == [None]
    assert plan_of("--models-dir", "x").models == ()
    assert [options.model for options in plan_of("--model", "a").models] == ["a"]


def test_a_file_of_models(tmp_path: Path) -> None:
    plan = plan_of("--config", written(tmp_path, FILE), "--port", "9", SENSORIUM_API_KEY="three")
    chat, embedder = plan.models
    assert (plan.common.server.memory, plan.common.server.host, plan.common.server.port) == (24 * 10**9, "0.0.0.0", 9)
    assert plan.common.server.api_key == ("one", "two", "three")
    assert (chat.model, chat.server.served_model_name) == ("Qwen/Qwen2-VL-2B-Instruct", ("chat", "gpt-4o", "llava"))
    assert (chat.engine.quantization, chat.engine.threads, chat.load.pinned) == ("int8", 2, True)
    assert chat.server.limit_mm_per_prompt == {"image": 4}
    assert (embedder.model, embedder.server.served_model_name) == ("BAAI/bge-m3", ("BAAI/bge-m3",))
    assert (embedder.load.lazy, embedder.load.idle_unload_s, embedder.engine.max_model_len) == (True, 90.0, 512)
    assert (embedder.engine.quantization, embedder.engine.threads) == ("auto", 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = ", "is not TOML"),
        ("x: 1", "is not TOML"),
        ("", "has no models"),
        ("models = 3", "models are tables"),
        ("[models]\nmodel = 'a'", "models are tables"),
        ("[models.a]\nquantisation = 'int8'", "[models.a]: unknown key 'quantisation'; did you mean 'quantization'?"),
        ("ports = 1\n[models.a]", "unknown key 'ports'; did you mean 'port'?"),
        ("[models.a]\nhost = 'x'", "[models.a]: host is the server's"),
        ("[models.a]\naliasses = ['x']", "did you mean 'aliases'?"),
        ("[models.a]\nquantization = 'int3'", "[models.a]: --quantization: invalid choice"),
        ("[models.a]\nmodel = 3", "model is a folder or a hub id"),
        ("[model.a]", "unknown key 'model'; did you mean 'models'?"),
        (
            "[models.a]\nmax-model-len = 64\nmax_model_len = 65",
            "[models.a]: 'max-model-len' and 'max_model_len' are one",
        ),
        ("api-key = ['x']\napi_key = ['y']\n[models.a]", "models.toml: 'api-key' and 'api_key' are one key"),
        *(
            (f"[models.a]\naliases = {bad}", "[models.a]: aliases are a list of names")
            for bad in ("'x'", "[1]", "['']")
        ),
        ("[models.a]\npinned = 1", "[models.a]: --pinned: it is on or off (true or false), not '1'"),
        ("[models.a]\nlazy = 'yes'", "[models.a]: --lazy: it is on or off (true or false), not 'yes'"),
        ("[models.a]\nlazy = ['yes']", "[models.a]: lazy takes one value, not a list"),
        ("port = [8000]\n[models.a]", "port takes one value, not a list"),
        ("[models.a]\nmax-model-len = [1, 2]", "[models.a]: max_model_len takes one value, not a list"),
        ("[models.a]\nlazy = {a = 1}", "[models.a]: --lazy: it is on or off (true or false), not"),
        ("port = 'x'\n[models.a]", "--port: 'x' is not a whole number"),
        ("[models.a]\npipeline-parallel-size = 2", "--pipeline-parallel-size"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError) as caught:
        plan_of("--config", written(tmp_path, text))
    assert words in caught.value.message


def test_a_list_without_values_says_nothing(tmp_path: Path) -> None:
    """A switch is not on, and of flags with values there is none."""
    plan = plan_of("--config", written(tmp_path, "[models.a]\nlazy = []\nlora = []\naliases = []"))
    assert (plan.models[0].load.lazy, plan.models[0].load.lora) == (False, ())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a", "b", "--served-model-name", "c"], "goes with one model"),
        (["a", "--config", "b"], "name the model in the file"),
    ],
)
def test_command_lines_that_contradict_themselves(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        plan_of(*argv)
    assert words in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config", str(tmp_path / "none.toml")]) == 2
    assert "No such file" in capsys.readouterr().err
