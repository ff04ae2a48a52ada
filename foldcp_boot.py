"""Import hook that switches Boltz over; foldcp.pth begins it when a FOLDCP variable is set.

It runs at the start of every Python program of the environment, so it imports the standard library
only and does nothing until `boltz` is imported.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
from collections.abc import Mapping
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


def begin(environ: Mapping[str, str]) -> None:
    """Install the hook when FOLDCP is on; when it is unset, say so if other variables are set.

    Args:
        environ: usually `os.environ`.
    """
    if environ.get("FOLDCP", "0") not in ("", "0"):
        install()
        return
    asked = sorted(n for n, value in environ.items() if value and _looks_ours(n))
    rank = environ.get("RANK") or environ.get("SLURM_PROCID") or "0"
    reminded = any(isinstance(finder, _Reminder) for finder in sys.meta_path)
    if asked and not environ.get("FOLDCP") and rank == "0" and not reminded:
        sys.meta_path.insert(0, _Reminder(asked[0]))


def _looks_ours(name: str) -> bool:
    """True for what may be meant for a run, such as FOLDCP_NPROC, and foldcp for FOLDCP."""
    plain = name.upper().replace("_", "")
    apart = "FOLDCP", "FOLDCP_SECRET", "FOLDCP_BUILD_CUDA"  # the last two are kept for all runs
    return plain.startswith("FOLDCP") and name not in apart


def install() -> None:
    """Add the hook to `sys.meta_path`; a second call does nothing."""
    if not installed():
        sys.meta_path.insert(0, _Finder())


def installed() -> bool:
    """Tell whether the hook is in `sys.meta_path`."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def runs_boltz() -> bool:
    """Tell Boltz's own command line from a program that imports Boltz."""
    name, _ = os.path.splitext(os.path.basename(sys.argv[0])) if sys.argv else ("", "")
    before_arguments = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    return name == "boltz" or before_arguments[-2:] == ["-m", TARGET]


def _leave_working_folder() -> None:
    """Take the working folder off the search path, where `python -m boltz.main` puts it first."""
    if "-m" in sys.orig_argv and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


def open_streams() -> None:
    """Make output and errors take any text, also where closed (`>&-`) or not in UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Reminder(importlib.abc.MetaPathFinder):
    """Says, where Boltz runs, that it runs as it is; finds nothing."""

    def __init__(self, asked: str) -> None:
        self._asked = asked

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == TARGET and self in sys.meta_path:
            sys.meta_path.remove(self)
            if runs_boltz():
                print(
                    f"foldcp: {self._asked} is set, but FOLDCP is not: Boltz runs as it is "
                    "(export FOLDCP=1 to switch it over, FOLDCP=0 to leave out this line)",
                    file=sys.stderr,
                )


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in ("boltz", TARGET):
            return None
        if name == "boltz" and runs_boltz():
            _leave_working_folder()
        spec = self._next_spec(name, path, target)
        if name == "boltz":
            if spec is None and runs_boltz():
                from foldcp.runtime import launch

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
        from foldcp.runtime import allocator, launch

        launch.check_version(ends_process=runs_boltz())
        from foldcp.boltz.seams import check

        check.require(module, ends_process=runs_boltz())
        if runs_boltz() and launch.predicts(sys.argv[1:]):
            open_streams()
            from foldcp.boltz.command import early

            early.refuse(sys.argv[1:], Path(str(module.__file__)), os.environ)
            allocator.grow_segments(os.environ)
            launch.start_processes_if_asked(sys.argv[1:])
            launch.announce(os.environ)
        from foldcp.boltz.command import caches

        caches.choose_numba_folder(os.environ, Path(str(module.__file__)).parent)
        try:
            self.inner.exec_module(module)
        except KeyboardInterrupt:
            if runs_boltz():  # several seconds, in which one changes one's mind
                launch.report_interrupt(os.environ)
            raise
        from foldcp.boltz import switch

        switch.patch(module)

    def get_code(self, name: str) -> CodeType:
        """Return code for `python -m` that imports the module, patched, and calls its command."""
        return compile(_RUN_AS_MAIN, f"<foldcp: {name}>", "exec")
