"""The command line: serve, chat, bench, info, version. Parses and hands over; the only reader of the environment.

Importing this loads neither torch nor the server, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from sensorium import __version__
from sensorium.cli.flags import Parser, add_accepted, add_flags, build
from sensorium.config import BenchConfig, ChatConfig, EngineConfig, Limits, LoadConfig, ServeOptions, ServerConfig
from sensorium.errors import StartupError

ClientConfig = TypeVar("ClientConfig", BenchConfig, ChatConfig)

SERVE_GROUPS = (("Model", LoadConfig), ("Engine", EngineConfig), ("Server", ServerConfig), ("Limits", Limits))

_EXAMPLES = """examples:
  sensorium serve                                   the built-in model on port 8000
  sensorium serve Qwen/Qwen2-VL-2B-Instruct --api-key KEY --limit-mm-per-prompt image=4
  sensorium chat                                    talk to it
  sensorium bench serve --concurrency 16            measure it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the process's exit code."""
    found = parser().read(sys.argv[1:] if argv is None else argv)
    try:
        return _run(found, os.environ)
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
    serve = _command(commands, "serve", "serve a model", usage="sensorium serve [MODEL] [flags]")
    serve.add_argument("model", nargs="?", metavar="MODEL", help="Folder or hub id. Default: the built-in model.")
    serve.add_argument("--model", dest="named", help=argparse.SUPPRESS)  # as in other servers' commands
    for title, config in SERVE_GROUPS:
        add_flags(serve, title, config)
    add_accepted(serve)
    add_flags(_command(commands, "chat", "talk to a running server"), "Chat", ChatConfig)
    bench = _command(commands, "bench", "measure a running server")
    load = _command(
        bench.add_subparsers(title="what", metavar="WHAT", required=True),
        "serve",
        "load any OpenAI-compatible server",
        name="bench serve",
    )
    add_flags(load, "Load", BenchConfig)
    _command(commands, "info", "devices, threads, kernels and versions")
    _command(commands, "version", "the version")
    return top


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


def _run(found: argparse.Namespace, environment: Mapping[str, str]) -> int:
    if found.command == "serve":
        from sensorium.cli.serve import serve

        return serve(serve_options(found, environment))
    if found.command == "chat":
        from sensorium.cli.chat import chat

        return chat(_with_key(build(ChatConfig, found), environment))
    if found.command == "bench serve":
        from sensorium.cli.bench import bench

        return bench(_with_key(build(BenchConfig, found), environment))
    if found.command == "info":
        from sensorium.cli.info import info

        return info()
    print(__version__)
    return 0


def serve_options(found: argparse.Namespace, environment: Mapping[str, str]) -> ServeOptions:
    """Everything `serve` needs to know, the environment's part included."""
    if found.model is not None and found.named not in (None, found.model):
        found.parser.error(f"two models are named: {found.model} and --model {found.named}")
    model = found.model or found.named
    server = build(ServerConfig, found)
    server = replace(server, api_key=server.api_key + _keys(environment))
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


def _keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(key.strip() for key in environment.get("SENSORIUM_API_KEY", "").split(",") if key.strip())


def _with_key(config: ClientConfig, environment: Mapping[str, str]) -> ClientConfig:
    keys = _keys(environment)
    return replace(config, api_key=keys[0]) if config.api_key is None and keys else config
