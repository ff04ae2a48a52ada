"""Import hook that switches Boltz over; foldcp.pth installs it when FOLDCP is on.

It runs at the start of every Python program of the environment, so it imports the standard library
only and does nothing until `boltz` is imported.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

TARGET = "boltz.main"

# `python -m boltz.main` would execute Boltz's code under the name __main__, past any import hook.
_RUN_AS_MAIN = f"""
if __name__ == "__main__":
    import sys
    from {TARGET} import cli
    sys.exit(cli())
else:
    from {TARGET} import *
"""


def install() -> None:
    """Add the hook to `sys.meta_path`; a second call does nothing."""
    if not installed():
        sys.meta_path.insert(0, _Finder())


def installed() -> bool:
    """True when the hook is in `sys.meta_path`."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def runs_boltz() -> bool:
    """True when this process is Boltz's own command line, not a program that imports Boltz."""
    name, _ = os.path.splitext(os.path.basename(sys.argv[0])) if sys.argv else ("", "")
    before_arguments = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    return name == "boltz" or before_arguments[-2:] == ["-m", TARGET]


def _leave_working_folder() -> None:
    """Take the working folder off the search path, where `python -m boltz.main` puts it first."""
    if "-m" in sys.orig_argv and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in ("boltz", TARGET):
            return None
        if name == "boltz" and runs_boltz():
            _leave_working_folder()
        spec = self._next_spec(name, path, target)
        if name == "boltz":
            if spec is None and runs_boltz():
                from foldcp.boltz import launch

                launch.report_missing_boltz()
            return spec
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec

    def _next_spec(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if not isinstance(finder, _Finder):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader(importlib.abc.Loader):
    """Boltz's own loader; the module is patched as soon as it has been executed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from foldcp import allocator
        from foldcp.boltz import launch

        launch.check_version(ends_process=runs_boltz())
        if runs_boltz():
            if launch.predicts(sys.argv[1:]):
                allocator.grow_segments(os.environ)
            launch.start_processes_if_asked(sys.argv[1:])
        from foldcp.boltz import caches

        caches.choose_numba_folder(os.environ, Path(str(module.__file__)).parent)
        self.inner.exec_module(module)
        from foldcp.boltz import switch

        switch.patch(module)

    def get_code(self, name: str) -> CodeType:
        """Code that `python -m` runs: it imports the module, patched, and calls its command."""
        return compile(_RUN_AS_MAIN, f"<foldcp: {name}>", "exec")
