"""What may import what, and what no file may contain. Read from the source by `ast`, so that nothing escapes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sensorium

SOURCE = Path(sensorium.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Folder -> folders it may import, beside itself and the leaves, top to bottom: nothing imports upwards.
LEAVES = {"__init__", "types", "errors", "config", "units"}
ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "config": {"units"},
    "__main__": {"cli", "cluster", "ipc"},
    "cluster": {"cli", "startup", "api", "serving", "system"},
    "llm": {"cli", "startup", "api", "serving", "prompt", "media"},
    "cli": {"startup", "api", "serving", "prompt", "media", "ipc", "checkpoint", "kernels", "weights", "system"},
    "api": {"serving", "prompt", "media", "ipc", "checkpoint", "system"},
    "startup": {"serving", "prompt", "media", "workers", "ipc", "checkpoint", "system"},
    "serving": {"processors", "prompt", "media", "ipc", "checkpoint", "system"},
    "processors": {"prompt", "media", "checkpoint"},
    "prompt": {"workers", "checkpoint", "system"},
    "media": {"workers", "system"},
    "workers": {"system"},
    "engine": {"models", "pooling", "weights", "kernels", "parallel", "ipc", "checkpoint", "system"},
    "models": {"pooling", "weights", "kernels", "parallel", "checkpoint"},
    "pooling": {"weights", "kernels", "checkpoint"},
    "weights": {"kernels", "parallel", "checkpoint"},
    "kernels": set(),
    "parallel": set(),
    "ipc": {"system"},
    "checkpoint": set(),
    "system": set(),
}
NEVER_TORCH = set(ALLOWED) - {"kernels", "parallel", "weights", "models", "pooling", "engine"}
# Of an extra that the tests do not need; nothing of ours imports these modules.
NEEDS_RAY = {"sensorium.cluster.sessions"}
HTTP_SIDE = NEVER_TORCH - {"__main__", "cli"}

# No settings there: they hand the environment on to the processes that they start, or are such a process (the engine
# reads which faults a test wants).
HAND_ENVIRONMENT_ON = {
    "workers/process.py",
    "ipc/client.py",
    "engine/loop.py",
    "ipc/nursery.py",
    "engine/warming.py",
    "prompt/convert.py",
}
# Only here may an `except` be broad: where one request's failure must not end the others', where a template's program
# may raise what it likes, and where the tokenizers library or a grammar's converter raises nothing more precise.
BROAD_EXCEPT = {
    "ipc/channel.py",
    "api/app.py",
    "api/transport/errors.py",
    "engine/follower.py",
    "engine/loop.py",
    "system/parent.py",
    "engine/encoding.py",
    "engine/shared_towers.py",
    "media/worker.py",
    "prompt/tokenizer.py",
    "prompt/grammar_check.py",
    "prompt/sandbox.py",
    "prompt/render_worker.py",
}
# The server renders no template itself: Jinja is for the process that can be killed, and for tools.
RUNS_TEMPLATES = {"sensorium.prompt.sandbox", "sensorium.prompt.render_worker", "sensorium.prompt.local"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MOST_LINES = 40  # of a function, its signature and docstring included
SAFE_TORCH_LOAD = "weights/tensor_files.py"


def layer(module: str) -> str:
    """`engine.scheduler` -> engine."""
    return module.partition(".")[0] or "__init__"


def relative(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


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
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner.removeprefix("sensorium.") in PACKAGES else child.module
        else:
            yield from imports(child)


TREES = {relative(file): ast.parse(file.read_text(), str(file)) for file in FILES}
MODULES = {relative(file): module_of(file) for file in FILES}
PACKAGES = set(MODULES.values())


def test_imports_go_one_way() -> None:
    found = []
    for file, tree in TREES.items():
        own = layer(MODULES[file])
        if own not in ALLOWED:
            found.append(f"{file}: give {own} a row in ALLOWED")
            continue
        allowed = ALLOWED[own] | {own} | (set() if own in LEAVES else LEAVES)
        found += [
            f"{file} imports {name}"
            for name in imports(tree)
            if name.split(".")[0] == "sensorium" and layer(name.partition(".")[2]) not in allowed
        ]
    assert not found


def test_serving_knows_neither_http_nor_pydantic() -> None:
    names = {(file, name.split(".")[0]) for file, tree in TREES.items() for name in imports(tree)}
    edge = {"pydantic", "pydantic_core", "uvicorn", "starlette", "httptools"}
    assert not [(file, name) for file, name in names if layer(MODULES[file]) == "serving" and name in edge]


def test_folders_are_sorted_from_top_to_bottom() -> None:
    order = [name for name in ALLOWED if name not in LEAVES]
    upward = [(name, other) for name in order for other in ALLOWED[name] if order.index(other) < order.index(name)]
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    edges = {
        module: {name.removeprefix("sensorium.") for name in imports(TREES[file])} & PACKAGES - {module}
        for file, module in MODULES.items()
    }
    left = dict(edges)
    while leaves := {module for module, targets in left.items() if not targets & left.keys()}:
        for module in leaves:
            del left[module]
    assert not left


def test_no_torch_outside_the_engine() -> None:
    found = {
        (file, name.split(".")[0])
        for file, tree in TREES.items()
        if layer(MODULES[file]) in NEVER_TORCH
        for name in imports(tree)
    }
    heavy = {(file, name) for file, name in found if name in ("torch", "transformers")}
    assert heavy <= {("prompt/convert.py", "transformers")}  # in a process of its own


@pytest.mark.parametrize("layers", [{"__init__"}, {"cli"}, HTTP_SIDE], ids=["package", "cli", "http"])
def test_the_http_process_loads_neither_torch_nor_transformers_nor_jinja(layers: set[str]) -> None:
    names = {f"sensorium.{name}".removesuffix(".__init__") for name in PACKAGES if layer(name) in layers}
    names -= RUNS_TEMPLATES | NEEDS_RAY
    code = f"import sys, {', '.join(sorted(names))}; print(*{{'torch', 'transformers', 'jinja2'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_nothing_dangerous_or_sloppy() -> None:
    found = [f"{file}:{node.lineno} {text}" for file, tree in TREES.items() for node, text in sins(file, tree)]
    assert not found


def sins(file: str, tree: ast.Module) -> Iterator[tuple[Any, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node, "assert"
        elif isinstance(node, ast.Call) and is_dangerous(node, file):
            yield node, ast.unparse(node.func)
        elif isinstance(node, ast.ExceptHandler) and is_broad(node) and file not in BROAD_EXCEPT:
            yield node, "broad except"
        elif is_unpickling(node):
            yield node, ast.unparse(node)


def is_unpickling(node: ast.AST) -> bool:
    """Any use of a module that unpickles, but for the name of what torch.load raises."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in UNPICKLERS
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) in UNPICKLERS and node.attr != "UnpicklingError"


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


def test_only_the_command_line_reads_the_environment() -> None:
    readers = {
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    }
    assert readers - HAND_ENVIRONMENT_ON == {"cli/main.py"}


def test_every_file_says_what_it_is() -> None:
    docs = {file: ast.get_docstring(tree) or "" for file, tree in TREES.items() if tree.body}
    assert not [file for file, text in docs.items() if not text]
    drawings = {"errors.py"}  # the tree
    assert {file for file, text in docs.items() if len(list(filter(None, text.splitlines()))) > 5} <= drawings


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{file}:{node.lineno} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MOST_LINES
    ]
    assert not long


def test_dependencies_are_what_is_imported() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[><=~;! ]", text)[0].replace("-", "_") for text in project["dependencies"]}
    imported = {name.split(".")[0] for tree in TREES.values() for name in imports(tree)} - set(sys.stdlib_module_names)
    optional = {"ray", "sensorium", "transformers", "triton"}
    assert {{"PIL": "pillow", "pydantic_core": "pydantic"}.get(name, name) for name in imported - optional} == declared
