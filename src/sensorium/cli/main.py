"""The command line of every command. Parses and hands over; the only reader of the environment.

Importing this loads neither torch nor the server, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from sensorium import __version__
from sensorium.cli.flags import Parser, add_accepted, add_flags, build, dashes
from sensorium.config import (
    BatchConfig,
    BenchConfig,
    ChatConfig,
    DeployConfig,
    EngineConfig,
    Limits,
    ListConfig,
    LoadConfig,
    ModelBenchConfig,
    PsConfig,
    PullConfig,
    ServeOptions,
    ServePlan,
    ServerConfig,
    StatusConfig,
    StopConfig,
)
from sensorium.errors import StartupError

ServerClient = TypeVar("ServerClient", BenchConfig, ChatConfig)
ClientConfig = TypeVar("ClientConfig", BenchConfig, ChatConfig, PsConfig)

SHELLS = ("bash", "zsh", "fish")
SERVE_GROUPS = (("Model", LoadConfig), ("Engine", EngineConfig), ("Server", ServerConfig), ("Limits", Limits))

_EXAMPLES = """examples:
  sensorium serve                                   the built-in model on port 8000
  sensorium serve Qwen/Qwen2-VL-2B-Instruct --api-key KEY --limit-mm-per-prompt image=4
  sensorium serve --config models.toml              several models
  sensorium run-batch -i in.jsonl -o out.jsonl MODEL   answer a file of requests
  sensorium deploy ray MODEL --replicas 1..8        replicas on the machines of a Ray cluster
  sensorium chat                                    talk to it
  sensorium bench serve --concurrency 16            measure it
"""


Command = Callable[[argparse.Namespace, Mapping[str, str], Sequence[str]], int]
NO_COMMANDS: Mapping[str, Command] = {}


def main(argv: Sequence[str] | None = None, others: Mapping[str, Command] = NO_COMMANDS) -> int:
    """Run one command; the result is the process's exit code. `others` are commands of folders above this one."""
    argv = sys.argv[1:] if argv is None else argv
    found = parser().read(argv)
    try:
        return {**_COMMANDS, **others}[found.command](found, os.environ, argv)
    except StartupError as error:
        print("sensorium:", " ".join(error.message.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> Parser:
    top = Parser(
        prog="sensorium",
        description="Multimodal models behind OpenAI's API.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_models(_command(commands, "serve", "serve models", usage="sensorium serve [MODEL ...] [flags]"))
    usage = "sensorium run-batch -i FILE -o FILE [MODEL ...] [flags]"
    batch = _command(commands, "run-batch", "answer a file of requests", usage=usage)
    _add_batch(batch)
    _add_models(batch)
    add_flags(_command(commands, "chat", "talk to a running server"), "Chat", ChatConfig)
    _add_deploy(_command(commands, "deploy", "start replicas on machines that somebody else manages"))
    status = "the servers of this machine, and the replicas of a Ray cluster"
    add_flags(_command(commands, "status", status), "Status", StatusConfig)
    add_flags(_command(commands, "ps", "list the servers that run on this machine"), "List", PsConfig)
    stop = _command(commands, "stop", "end a server that runs on this machine")
    stop.add_argument("which", nargs="*", metavar="SERVER", help="Process id, port or address. Default: the only one.")
    add_flags(stop, "Stop", StopConfig)
    _add_benches(_command(commands, "bench", "measure a server or a model"))
    told = _command(commands, "info", "devices, threads, kernels and versions; or what a model is and takes")
    told.add_argument(
        "model", nargs="?", metavar="MODEL", help="Folder, GGUF file, hub id or demo. Default: tell of this machine."
    )
    told.add_argument("--draft-model", metavar="MODEL", help="Of a model that guesses its tokens: both are counted.")
    add_flags(_command(commands, "list", "the models on this machine"), "List", ListConfig)
    pull = _command(commands, "pull", "fetch a model from the hub")
    pull.add_argument("model", metavar="MODEL", help="Hub id.")
    add_flags(pull, "Pull", PullConfig)
    shells = _command(commands, "completion", "print what completes commands and flags in a shell")
    shells.add_argument("shell", choices=SHELLS, help="Its output is for the shell's start file: see docs (commands).")
    _command(commands, "version", "the version")
    return top


def _add_deploy(deploy: Parser) -> None:
    kinds = deploy.add_subparsers(title="where", metavar="WHERE", required=True)
    usage = "sensorium deploy ray [MODEL ...] [flags]"
    ray = _command(kinds, "ray", "replicas on the machines of a Ray cluster", name="deploy ray", usage=usage)
    add_flags(ray, "Replicas", DeployConfig)
    _add_models(ray)


def _add_benches(bench: Parser) -> None:
    kinds = bench.add_subparsers(title="what", metavar="WHAT", required=True)
    add_flags(_command(kinds, "serve", "load any OpenAI-compatible server", name="bench serve"), "Load", BenchConfig)
    for word, help in (
        ("throughput", "tokens a second of a model that is asked everything at once"),
        ("latency", "seconds that a model takes for a few requests"),
        ("startup", "seconds until a server is ready"),
    ):
        usage = f"sensorium bench {word} [MODEL] [flags]"
        command = _command(kinds, word, help, name=f"bench {word}", usage=usage)
        add_flags(command, "Bench", ModelBenchConfig)
        _add_models(command)


def _add_models(command: Parser) -> None:
    command.add_argument("model", nargs="*", metavar="MODEL", help="Folder or hub id. Default: the built-in model.")
    command.add_argument("--config", metavar="FILE", help="TOML file of models and flags (docs: catalogue).")
    command.add_argument("--model", dest="named", help=argparse.SUPPRESS)  # as in other servers' commands
    for title, config in SERVE_GROUPS:
        add_flags(command, title, config)
    add_accepted(command)


def _add_batch(command: Parser) -> None:
    add_flags(command, "Batch", BatchConfig, short={"input_file": "-i", "output_file": "-o"})


def _command(
    commands: argparse._SubParsersAction[Parser],
    word: str,
    help: str,
    *,
    usage: str | None = None,
    name: str | None = None,
) -> Parser:
    command = commands.add_parser(word, help=help, description=help[0].upper() + help[1:] + ".", usage=usage)
    command.set_defaults(command=name or word, parser=command)
    return command


# Every command imports what it needs: others are not to wait for it.


def _serve(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.serve import serve

    return serve(serve_plan(found, environment, argv), _runtime_folder(environment))


def _run_batch(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.run_batch import run_batch

    return run_batch(batch_config(found), serve_plan(found, environment, _of_serve(argv, _add_batch)))


def _chat(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.chat import chat

    return chat(_reached(build(ChatConfig, found), environment))


def _bench_serve(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.bench import bench

    return bench(_reached(build(BenchConfig, found), environment))


def _bench_model(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli import bench_model

    config = build(ModelBenchConfig, found)
    words = _of_serve(argv[1:], lambda own: add_flags(own, "Bench", ModelBenchConfig))  # throughput MODEL ...
    if found.command == "bench startup":
        return bench_model.bench_startup(config, words[1:])
    measure = {"bench throughput": bench_model.bench_throughput, "bench latency": bench_model.bench_latency}
    return measure[found.command](config, serve_plan(found, environment, words))


def _ps(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.servers import ps

    return ps(_runtime_folder(environment), _with_key(build(PsConfig, found), environment).api_key)


def _stop(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.servers import stop

    config = build(StopConfig, found)
    return stop(_runtime_folder(environment), found.which, all_of_them=config.all, timeout_s=config.timeout_s)


def _info(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.info import info

    return info(found.model, found.draft_model)


def _list(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.models import list_models

    return list_models(build(ListConfig, found))


def _pull(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.models import pull
    from sensorium.cli.serve import log_to_stderr

    log_to_stderr()
    return pull(found.model, build(PullConfig, found))


def _completion(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.completion import script

    print(script(found.shell, parser()), end="")
    return 0


def _version(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    print(__version__)
    return 0


_COMMANDS: Mapping[str, Command] = {
    "serve": _serve,
    "run-batch": _run_batch,
    "chat": _chat,
    "bench serve": _bench_serve,
    "bench throughput": _bench_model,
    "bench latency": _bench_model,
    "bench startup": _bench_model,
    "ps": _ps,
    "stop": _stop,
    "info": _info,
    "list": _list,
    "pull": _pull,
    "completion": _completion,
    "version": _version,
}


def deploy_plan(
    found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]
) -> tuple[DeployConfig, ServePlan]:
    """How many replicas, and of what."""
    words = _of_serve(argv[1:], lambda own: add_flags(own, "Replicas", DeployConfig))  # ray MODEL ...
    return build(DeployConfig, found), serve_plan(found, environment, words)


def _runtime_folder(environment: Mapping[str, str]) -> Path:
    from sensorium.cli.servers import runtime_folder

    return runtime_folder(environment)


def serve_plan(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> ServePlan:
    """All models of a server: those of the command line, or of the file that it names."""
    if found.config is not None:
        from sensorium.cli.models_file import read_models_file

        if _models(found):
            found.parser.error(f"{_models(found)[0]} and --config are given: name the model in the file")
        return read_models_file(found.config, argv[1:], lambda words, where: read_serve(words, where, environment))
    models = _models(found)
    if len(models) > 1 and getattr(found, "served_model_name", None):
        found.parser.error("--served-model-name goes with one model; --config gives a name to each of several")
    options = serve_options(found, environment)
    if not models:
        return ServePlan(options, () if options.server.models_dir is not None else (options,))
    return ServePlan(options, tuple(replace(options, model=model) for model in models))


def batch_config(found: argparse.Namespace) -> BatchConfig:
    config = build(BatchConfig, found)
    for name in ("input_file", "output_file"):
        if not getattr(config, name):
            found.parser.error(f"--{name.replace('_', '-')} is needed")
    if config.url is not None and (_models(found) or found.config is not None):
        found.parser.error("--url names a server that has its model: leave MODEL and --config out")
    return config


def _of_serve(argv: Sequence[str], add_own: Callable[[Parser], None]) -> Sequence[str]:
    """The words of a command that serve has too, the command's own left out."""
    own = Parser(add_help=False)
    add_own(own)
    return own.parse_known_args(dashes(argv))[1]


def read_serve(words: Sequence[str], where: str, environment: Mapping[str, str] | None = None) -> ServeOptions:
    """The options of one model from the words of a command line that nobody typed. StartupError says what is wrong,
    `where`."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return serve_options(parser().read(words), environment or {})
    except SystemExit:
        line = said.getvalue().strip().removeprefix("sensorium serve: ").partition(" (see ")[0]
        raise StartupError(f"{where}: {line}") from None


def _models(found: argparse.Namespace) -> list[str]:
    if found.model and found.named not in (None, found.model[0]):
        found.parser.error(f"two models are named: {found.model[0]} and --model {found.named}")
    return list(found.model) or ([found.named] if found.named is not None else [])


def serve_options(found: argparse.Namespace, environment: Mapping[str, str]) -> ServeOptions:
    """Everything `serve` needs to know of its first model, the environment's part included."""
    model = next(iter(_models(found)), None)
    server = build(ServerConfig, found)
    server = replace(
        server,
        api_key=server.api_key + _keys(environment),
        operator_key=server.operator_key + _keys(environment, "SENSORIUM_OPERATOR_KEY"),
    )
    for name in ("served_model_name", "allowed_media_domains"):
        swallowed = [value for value in getattr(server, name) if "/" in value]
        if model is None and swallowed:
            found.parser.error(
                f"{swallowed[-1]!r} was read as a value of --{name.replace('_', '-')}; put MODEL before the flags"
            )
    return ServeOptions(
        model=model,
        load=build(LoadConfig, found),
        engine=build(EngineConfig, found, model=""),
        server=server,
        limits=build(Limits, found),
        notes=tuple(getattr(found, "notes", ())),
    )


def _keys(environment: Mapping[str, str], name: str = "SENSORIUM_API_KEY") -> tuple[str, ...]:
    return tuple(key.strip() for key in environment.get(name, "").split(",") if key.strip())


def _reached(config: ServerClient, environment: Mapping[str, str]) -> ServerClient:
    """With the address of a server, and the environment's key."""
    from sensorium.cli.servers import only_url

    return _with_key(replace(config, base_url=config.base_url or only_url(_runtime_folder(environment))), environment)


def _with_key(config: ClientConfig, environment: Mapping[str, str]) -> ClientConfig:
    keys = _keys(environment)
    return replace(config, api_key=keys[0]) if config.api_key is None and keys else config
