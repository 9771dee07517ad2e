"""Flags come from the config dataclasses: both spellings, every parser, and one clear line for what is wrong."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from sensorium.cli import SERVE_GROUPS, parser, serve_options
from sensorium.config import EngineConfig, Limits, ServeOptions, ServerConfig
from sensorium.flags import FOREIGN_FLAGS, flags_of, size_text


def options(*argv: str, **environment: str) -> ServeOptions:
    return serve_options(parser().read(["serve", *argv]), environment)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        options(*argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_defaults_are_the_dataclasses() -> None:
    found = options()
    assert found.model is None
    assert found.engine == EngineConfig(model="")
    assert found.server == ServerConfig()
    assert found.limits == Limits()


def test_dashes_and_underscores_mean_the_same() -> None:
    found = [options("m", *argv) for argv in (["--max_model_len", "8"], ["--max-model-len=8"], ["--max_model_len=8"])]
    assert found[0] == found[1] == found[2]
    assert found[0].engine.max_model_len == 8


def test_values_keep_their_underscores() -> None:
    assert options("a_b", "--served_model_name=my_model", "--revision", "x_y").server.served_model_name == ("my_model",)


@pytest.mark.parametrize(("text", "size_bytes"), [
    ("256MiB", 256 * 1024**2), ("4GB", 4 * 10**9), ("4gib", 4 * 1024**3), ("1.5GiB", 3 * 1024**3 // 2), ("512", 512),
    ("64 KB", 64_000), ("7B", 7)])
def test_sizes(text: str, size_bytes: int) -> None:
    assert options("--kv-cache-memory", text).engine.kv_cache_memory == size_bytes


@pytest.mark.parametrize("text", ["4G", "x", "", "-1", "GB", "1e9", "4 parsecs", "nan"])
def test_bad_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kv-cache-memory" in refusal(capsys, f"--kv-cache-memory={text}")


@pytest.mark.parametrize("text", ["image=2,video=1", "image=2, video=1", '{"image": 2, "video": 1}'])
def test_counts(text: str) -> None:
    assert options("--limit-mm-per-prompt", text).server.limit_mm_per_prompt == {"image": 2, "video": 1}


@pytest.mark.parametrize("text", ["image", "image=x", "image=-1", "smell=1", '{"image": true}',
                                  '{"image": {"count": 1}}', "[1]", "{", ""])
def test_bad_counts(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--limit-mm-per-prompt" in refusal(capsys, f"--limit-mm-per-prompt={text}")


def test_json_objects(capsys: pytest.CaptureFixture[str]) -> None:
    found = options("--mm_processor_kwargs", '{"max_pixels": 1003520}')
    assert found.server.mm_processor_kwargs == {"max_pixels": 1003520}
    assert "JSON" in refusal(capsys, "--mm-processor-kwargs", "max_pixels")
    assert "JSON" in refusal(capsys, "--mm-processor-kwargs", "[1]")
    assert "JSON" in refusal(capsys, "--mm-processor-kwargs", "[" * 100_000)


def test_switches() -> None:
    assert options().engine.enable_prefix_caching
    assert not options("--no-enable-prefix-caching").engine.enable_prefix_caching
    assert not options("--no_enable_prefix_caching").engine.enable_prefix_caching
    assert options("--disable-log-requests").server.disable_log_requests


def test_keys_come_from_flags_and_the_environment() -> None:
    found = options("--api-key", "one", "--api-key=two", SENSORIUM_API_KEY="three, four,")
    assert found.server.api_key == ("one", "two", "three", "four")
    assert options().server.api_key == ()


def test_several_names() -> None:
    found = options("m", "--served-model-name", "a", "b/c", "--allowed-media-domains", "localhost", "10.0.0.1")
    assert found.server.served_model_name == ("a", "b/c")
    assert found.server.allowed_media_domains == ("localhost", "10.0.0.1")


def test_a_model_swallowed_by_a_list_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "put MODEL before" in refusal(capsys, "--served-model-name", "a", "org/model")


@pytest.mark.parametrize(("argv", "words"), [
    (["--max-modl-len", "4"], "did you mean --max-model-len?"),
    (["--zzzzzz"], "unknown flag --zzzzzz"),
    (["--max-num"], "unknown flag --max-num"),  # no abbreviations: they would change meaning with new flags
    (["a", "b"], "unexpected argument 'b'"),
    (["--port", "x"], "not a whole number"),
    (["--port", "65536"], "from 0 to 65535"),
    (["--max-num-seqs", "0"], "at least 1"),
    (["--gpu-memory-utilization", "1.5"], "from 0.01 to 1"),
    (["--gpu-memory-utilization", "nan"], "not a number"),
    (["--dtype", "int3"], "invalid choice: 'int3'"),
    (["--quantization", "int3"], "invalid choice: 'int3'"),
    (["--quantization-group-size", "16"], "from 32 to 128"),
    (["--kv-cache-dtype", "fp8"], "invalid choice: 'fp8' (choose from"),
    (["--max-images", "-1"], "at least 0"),
    (["--revision"], "expected one argument")])
def test_wrong_command_lines(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize("flag", sorted(FOREIGN_FLAGS))
def test_flags_of_vllm_get_an_answer(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert FOREIGN_FLAGS[flag] in refusal(capsys, flag, "1")


def test_foreign_flags_are_not_ours() -> None:
    ours = {flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)}
    assert not ours & set(FOREIGN_FLAGS)


def test_no_two_flags_share_a_name() -> None:
    names = [flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)]
    assert len(names) == len(set(names))


def test_every_flag_that_users_of_vllm_know_is_there() -> None:
    names = {flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)}
    assert names >= {f"--{name}" for name in (
        "host port api-key dtype device max-model-len max-num-seqs max-num-batched-tokens gpu-memory-utilization "
        "kv-cache-memory kv-cache-dtype quantization block-size enable-prefix-caching limit-mm-per-prompt "
        "mm-processor-kwargs allowed-local-media-path allowed-media-domains chat-template served-model-name revision "
        "download-dir trust-remote-code task seed root-path disable-log-requests").split()}


def test_help_names_every_flag_in_groups() -> None:
    subparser = parser().read(["serve"]).parser
    text = subparser.format_help()
    for title, config in SERVE_GROUPS:
        assert f"\n{title}:\n" in text
        assert all(flag.option in text for flag in flags_of(config))


def test_size_text_is_exact() -> None:
    assert [size_text(n) for n in (0, 1, 1024, 1536, 256 * 1024**2)] == ["0", "1", "1KiB", "1536", "256MiB"]


def test_help_is_quick_and_light() -> None:
    code = "import sys; from sensorium.cli import parser; parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "fastapi", "httpx", "rich", "asyncio"} & set(modules)
    start_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sensorium", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - start_s < 1.0  # 0.06 s on an idle machine; the tests' machine is not idle
