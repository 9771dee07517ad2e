"""Modules that are read when something of them is first used, not when they are imported.

A library's package imports all of its parts, also those that a program never uses. A postponed module is found and
stands in `sys.modules` like any other; its file is executed at the first look for a name that it does not have yet. An
error of that comes then, at every look.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_lock = threading.RLock()


class Unread(ModuleType):
    """Has what its spec says of it: where it is, and where its submodules are."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__") or name == "__all__":  # who walks through all modules asks for other such names
            read(self)
        if name in vars(self):
            return vars(self)[name]
        if type(self) is not Unread:  # it may have a function for that
            return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> Iterable[str]:
        read(self)
        return dir(self)


class _Later(Loader):
    """Makes an `Unread` of what another loader would execute."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = Unread


class _Finder(MetaPathFinder):
    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self._names else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


def postpone(names: Iterable[str]) -> None:
    """From now on, for modules that were not imported yet."""
    sys.meta_path.insert(0, _Finder(names))


def read(module: ModuleType) -> None:
    """Execute the file of a postponed one; nothing happens to any other. Another thread's reading is waited for; what
    this one's imports sees what there is so far, as with any module."""
    with _lock:
        spec = module.__spec__
        if type(module) is not Unread or spec is None or not isinstance(spec.loader, _Later):
            return
        later, spec.loader = spec.loader, spec.loader.loader
        try:
            spec.loader.exec_module(module)
        except BaseException:
            spec.loader = later
            raise
        module.__loader__ = spec.loader
        object.__setattr__(module, "__class__", ModuleType)


def read_all() -> None:
    """All that were imported and not read yet."""
    for module in [one for one in sys.modules.values() if type(one) is Unread]:
        read(module)
