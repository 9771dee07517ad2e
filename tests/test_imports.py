"""What may import what, and what no file may contain. Read from the source by `ast`, so that nothing escapes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sensorium

SOURCE = Path(sensorium.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Layer -> layers it may import, beside itself and the leaves. A module belongs to the longest name that it starts with.
LEAVES = {"__init__", "types", "errors", "config"}
HTTP_SIDE = {"media", "prompt", "processors", "engine.client", "engine.messages", "checkpoint", "models.registry"}
ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "__main__": {"cli"},
    "flags": set(),
    "processes": set(),
    "remote": set(),
    "bench": {"remote"},
    "chat": {"remote"},
    "info": {"kernels"},
    "checkpoint": {"models.registry"},
    "models.registry": set(),
    "media": set(),
    "prompt": set(),
    "processors": {"checkpoint", "prompt"},
    "engine.messages": set(),
    "engine.client": {"engine.messages"},
    "served": HTTP_SIDE,
    "api": HTTP_SIDE | {"served"},
    "kernels": {"models.base"},
    "models": {"checkpoint", "kernels", "models.registry", "pooling"},
    "pooling": {"checkpoint", "kernels"},
    "engine": {"checkpoint", "kernels", "models", "models.registry", "pooling", "engine.messages"},
    "serve": HTTP_SIDE | {"served", "api", "processes"},
    "cli": {"flags", "serve", "chat", "bench", "info"},
}
NEVER_TORCH = set(ALLOWED) - {"kernels", "models", "pooling", "engine", "info"}

# No settings there: they hand the environment on to the processes that they start, or are such a process (the engine
# reads which faults a test wants).
HAND_ENVIRONMENT_ON = {"media/pool.py", "engine/client.py", "engine/core.py", "prompt/convert.py"}
# Only here may an `except` be broad: where one request's failure must not end the others', and where the tokenizers
# library raises nothing more precise.
BROAD_EXCEPT = {"api/app.py", "api/errors.py", "engine/core.py", "engine/runner.py", "prompt/tokenizer.py"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
SAFE_TORCH_LOAD = "models/weights.py"


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def layer(module: str) -> str:
    """`engine.client` -> engine.client, `engine.scheduler` -> engine."""
    parts = module.split(".") if module else ["__init__"]
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), parts[0])


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(node: ast.AST) -> Iterator[str]:
    """Every module that is imported when the code runs, wherever the statement stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            packages = {module_of(file) for file in FILES}
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner.removeprefix("sensorium.") in packages else child.module
        else:
            yield from imports(child)


def relative(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_go_one_way(file: Path) -> None:
    own = layer(module_of(file))
    assert own in ALLOWED, f"give {module_of(file)} a row in ALLOWED"
    for name in imports(tree(file)):
        if name == "sensorium" or name.startswith("sensorium."):
            target = layer(name.partition(".")[2])
            allowed = ALLOWED[own] | {own} | (set() if own in LEAVES else LEAVES)
            assert target in allowed, f"{relative(file)} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if layer(module_of(file)) in NEVER_TORCH], ids=relative)
def test_no_torch_outside_the_engine(file: Path) -> None:
    heavy = {name.split(".")[0] for name in imports(tree(file))} & {"torch", "transformers"}
    assert not heavy or (relative(file), heavy) == ("prompt/convert.py", {"transformers"})


@pytest.mark.parametrize("module", ["sensorium", "sensorium.cli", "sensorium.api.server", "sensorium.served",
                                    "sensorium.media.loader", "sensorium.prompt.tokenizer", "sensorium.prompt.template",
                                    "sensorium.engine.client", "sensorium.checkpoint", "sensorium.serve"])
def test_the_http_process_loads_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_nothing_dangerous_or_sloppy(file: Path) -> None:
    found = []
    for node in ast.walk(tree(file)):
        where = f"{relative(file)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Assert):
            found.append(f"{where} assert")
        elif isinstance(node, ast.Call) and is_dangerous(node, relative(file)):
            found.append(f"{where} {ast.unparse(node.func)}")
        elif isinstance(node, ast.ExceptHandler) and is_broad(node) and relative(file) not in BROAD_EXCEPT:
            found.append(f"{where} broad except")
        elif (isinstance(node, ast.Attribute | ast.ImportFrom)
              and (name := ast.unparse(node)).split(".")[0].removeprefix("from ").split(" ")[0] in UNPICKLERS
              and name != "pickle.UnpicklingError"):  # what torch.load raises
            found.append(f"{where} {name}")
    assert not found


def is_dangerous(call: ast.Call, file: str) -> bool:
    name = ast.unparse(call.func)
    if name == "torch.load":
        safe = any(word.arg == "weights_only" and getattr(word.value, "value", False) is True for word in call.keywords)
        return not (safe and file == SAFE_TORCH_LOAD)
    allows_pickle = any(word.arg == "allow_pickle" for word in call.keywords)
    return name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or allows_pickle


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Catches everything and does not raise it again."""
    names = re.findall(r"\w+", ast.unparse(handler.type)) if handler.type else ["Exception"]
    raised_again = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
    return bool({"Exception", "BaseException"} & set(names)) and not raised_again


@pytest.mark.parametrize(
    "file", [file for file in FILES if relative(file) not in HAND_ENVIRONMENT_ON | {"cli.py"}], ids=relative)
def test_only_the_command_line_reads_the_environment(file: Path) -> None:
    reads = [ast.unparse(node) for node in ast.walk(tree(file))
             if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")]
    assert not reads


@pytest.mark.parametrize("file", [file for file in FILES if tree(file).body], ids=relative)
def test_every_file_says_what_it_is(file: Path) -> None:
    text = ast.get_docstring(tree(file))
    assert text
    lines = [line for line in text.splitlines() if line]
    assert len(lines) <= 5 or relative(file) == "errors.py"  # which draws its tree


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[><=~;! ]", text)[0].replace("-", "_") for text in project["dependencies"]}
    imported = {name.split(".")[0] for file in FILES for name in imports(tree(file))} - set(sys.stdlib_module_names)
    optional = {"sensorium", "transformers"}
    assert {{"PIL": "pillow", "pydantic_core": "pydantic"}.get(name, name) for name in imported - optional} == declared
