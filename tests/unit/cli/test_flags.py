"""Flags come from the config dataclasses: both spellings, every parser, and one clear line for what is wrong."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from sensorium.cli.flags import flags_of
from sensorium.cli.main import SERVE_GROUPS, parser, serve_options
from sensorium.cli.other_flags import ACCEPTED, REFUSED, RENAMED
from sensorium.config import EngineConfig, Limits, ServeOptions, ServerConfig


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


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256MiB", 256 * 1024**2),
        ("4GB", 4 * 10**9),
        ("4gib", 4 * 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("512", 512),
        ("64 KB", 64_000),
        ("7B", 7),
        ("4G", 4 * 1024**3),
        ("4g", 4 * 10**9),
        ("512M", 512 * 1024**2),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert options("--kv-cache-memory", text).engine.kv_cache_memory == size_bytes


@pytest.mark.parametrize("text", ["4P", "4T", "x", "", "-1", "GB", "1e9", "4 parsecs", "nan"])
def test_bad_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--kv-cache-memory" in refusal(capsys, f"--kv-cache-memory={text}")


@pytest.mark.parametrize("text", ["image=2,video=1", "image=2, video=1", '{"image": 2, "video": 1}'])
def test_counts(text: str) -> None:
    assert options("--limit-mm-per-prompt", text).server.limit_mm_per_prompt == {"image": 2, "video": 1}


@pytest.mark.parametrize(
    "text", ["image", "image=x", "image=-1", "smell=1", '{"image": true}', '{"image": {"count": 1}}', "[1]", "{", ""]
)
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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-modl-len", "4"], "did you mean --max-model-len?"),
        (["--zzzzzz"], "unknown flag --zzzzzz"),
        (["--max-num"], "unknown flag --max-num"),  # no abbreviations: they would change meaning with new flags
        (["a", "--seed", "1", "b"], "unexpected argument 'b'"),
        (["m", "-n", "4"], "requests say it"),  # not a beginning of -ngl
        (["m", "-x"], "unknown flag -x"),
        (["--port", "x"], "not a whole number"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--max-num-seqs", "0"], "at least 1"),
        (["--gpu-memory-utilization", "1.5"], "from 0.01 to 1"),
        (["--gpu-memory-utilization", "nan"], "not a number"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--quantization", "int3"], "invalid choice: 'int3'"),
        (["--quantization-group-size", "16"], "from 32 to 128"),
        (["--kv-cache-dtype", "fp4"], "invalid choice: 'fp4' (choose from"),
        (["--max-images", "-1"], "at least 0"),
        (["--revision"], "expected one argument"),
    ],
)
def test_wrong_command_lines(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        ("32K", 32768),
        ("32k", 32000),
        ("1.5k", 1500),
        ("1M", 1024**2),
        ("2m", 2_000_000),
        ("auto", None),
        ("AUTO", None),
        ("-1", None),
    ],
)
def test_lengths(text: str, tokens: int | None) -> None:
    assert options("m", "--max-model-len", text).engine.max_model_len == tokens
    assert options("m", f"--max_model_len={text}").engine.max_model_len == tokens
    assert options("m", "-c", text).engine.max_model_len == tokens


@pytest.mark.parametrize("text", ["0", "-2", "32 thousand", "1.5K", "4.5", "K", "", "32KiB", "0k", "1e3", "none"])
def test_bad_lengths(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-model-len" in refusal(capsys, "m", f"--max-model-len={text}")


def test_a_step_s_tokens_are_written_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert options("--max-num-batched-tokens", "8K").engine.max_num_batched_tokens == 8192
    assert "--max-num-batched-tokens" in refusal(capsys, "--max-num-batched-tokens", "auto")


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("half", "float16"),
        ("float", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("float32", "float32"),
        ("auto", "auto"),
        ("HALF", "float16"),
        ("bf16", "bfloat16"),
    ],
)
def test_types_in_others_words(text: str, dtype: str) -> None:
    assert options("--dtype", text).engine.dtype == dtype


@pytest.mark.parametrize("flag", sorted(ACCEPTED))
def test_what_changes_nothing_is_taken_with_a_line(flag: str) -> None:
    accepted = ACCEPTED[flag]
    value = (accepted.values or ("1",))[0]
    given = {"switch": [flag], "value": [flag, value], "values": [flag, "1", "2"], "optional": [flag]}[accepted.takes]
    found = options("m", *given, "--port", "0")
    assert (found.model, found.server.port) == ("m", 0)
    assert found.notes == (f"{flag} changes nothing here: {accepted.why}",)
    assert options("m", *given).engine == options("m").engine
    if accepted.takes == "value":
        assert options("m", f"{flag}={value}").notes == found.notes
        assert options(f"{flag}={value}", "m").model == "m"


@pytest.mark.parametrize("flag", sorted(flag for flag, accepted in ACCEPTED.items() if accepted.values))
def test_values_that_would_change_something_are_not(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "m", flag, "7")
    assert f"{flag} 7" in error
    assert ACCEPTED[flag].why in error


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_flags_that_are_not_offered_get_an_answer(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED[flag] in refusal(capsys, "m", flag, "1")


def test_flags_of_others_are_not_ours() -> None:
    ours = {flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)} | {"--model"}
    tables = (set(ACCEPTED), set(REFUSED), set(RENAMED))
    for table in tables:
        assert not ours & table
        assert sum(not table.isdisjoint(other) for other in tables) == 1
    switches = {"--no-" + name[2:] for name in ours}
    assert {words[0] for words in RENAMED.values()} <= ours | switches


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--model-path", "m", "--context-length", "8K"], ["m", "--max-model-len", "8192"]),
        (["--model-id=m", "--hostname=0.0.0.0"], ["m", "--host", "0.0.0.0"]),
        (
            ["-m", "m", "-c", "4096", "-np", "4", "-t", "2", "--alias", "x"],
            ["m", "--max-model-len", "4096", "--max-num-seqs", "4", "--threads", "2", "--served-model-name", "x"],
        ),
        (["--model", "m", "--is-embedding"], ["m", "--task", "embed"]),
        (["m", "--embedding"], ["m", "--task", "embed"]),
        (["m", "--reranking"], ["m", "--task", "score"]),
        (["m", "--task", "embedding"], ["m", "--task", "embed"]),
        (["m", "--disable-radix-cache"], ["m", "--no-enable-prefix-caching"]),
        (["m", "--mem-fraction-static", "0.8"], ["m", "--gpu-memory-utilization", "0.8"]),
        (["m", "--no-enable-log-requests"], ["m", "--disable-log-requests"]),
        (["m", "--enable-log-requests"], ["m", "--no-disable-log-requests"]),
        (["m", "--kv-cache-memory-bytes", "4G"], ["m", "--kv-cache-memory", "4GiB"]),
        (
            ["m", "--limit-mm-per-prompt.image", "3", "--hf-overrides.a.b=x", "--hf-overrides.a.c", "[1]"],
            ["m", "--limit-mm-per-prompt", '{"image": 3}', "--hf-overrides", '{"a": {"b": "x", "c": [1]}}'],
        ),
        (["m", "--device", "gpu", "-q", "gptq_marlin"], ["m", "--device", "cuda", "--quantization", "gptq"]),
    ],
)
def test_ours_by_another_name(given: list[str], meant: list[str]) -> None:
    assert options(*given) == options(*meant)


def test_two_models_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert options("m", "--model", "m").model == "m"
    assert "two models" in refusal(capsys, "m", "--model", "n")


def test_no_two_flags_share_a_name() -> None:
    names = [flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)]
    assert len(names) == len(set(names))


def test_every_flag_that_users_of_vllm_know_is_there() -> None:
    names = {flag.option for _, config in SERVE_GROUPS for flag in flags_of(config)}
    assert names >= {
        f"--{name}"
        for name in (
            "host port api-key dtype device max-model-len max-num-seqs max-num-batched-tokens gpu-memory-utilization "
            "kv-cache-memory kv-cache-dtype quantization block-size enable-prefix-caching limit-mm-per-prompt "
            "mm-processor-kwargs allowed-local-media-path allowed-media-domains chat-template served-model-name "
            "revision "
            "download-dir trust-remote-code task seed root-path disable-log-requests"
        ).split()
    }


def test_help_names_every_flag_in_groups() -> None:
    subparser = parser().read(["serve"]).parser
    text = subparser.format_help()
    for title, config in SERVE_GROUPS:
        assert f"\n{title}:\n" in text
        assert all(flag.option in text for flag in flags_of(config))


def test_help_is_quick_and_light() -> None:
    code = "import sys; from sensorium.cli.main import parser; parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "fastapi", "httpx", "rich", "asyncio"} & set(modules)
    used_s = _children_s()
    subprocess.run([sys.executable, "-m", "sensorium", "--help"], capture_output=True, check=True)
    assert _children_s() - used_s < 5


def _children_s() -> float:
    """Processor time of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        (["https://Chat.example/"], ("https://chat.example",)),
        (["http://a:3000", "http://b"], ("http://a:3000", "http://b")),
        (['["http://a", "*"]'], ("http://a,*",)),
        (["*"], ("*",)),
    ],
)
def test_origins_as_vllm_writes_them_or_plainly(words: list[str], origins: tuple[str, ...]) -> None:
    found = serve_options(parser().read(["serve", "m", "--allowed-origins", *words]), {})
    assert found.server.allowed_origins == origins


@pytest.mark.parametrize("word", ["chat.example", "http://a/path", "[5]", "[]", "[", ""])
def test_what_is_no_origin(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().read(["serve", "m", "--allowed-origins", word])
    assert "is not an origin" in capsys.readouterr().err
