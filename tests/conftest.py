"""Test session: root importable, one thread, uninitialised memory poisoned; tiers and markers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported; processes that the tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the kernels run in Triton's interpreter; a kernel decides so when it is defined.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from strict import strict  # noqa: E402

if TYPE_CHECKING:
    from parity import Prepared

strict()
# Folders whose tests start no process and need no Boltz, but for those marked `process`.
QUICK = ("unit", "kernels")
# Files that take minutes come first, so that no worker is left alone with one of them at the end.
ORDER = ("kernels", "install", "modules", "runs", "compat", "fabric", "unit")
# Markers of a folder's tests, and of those whose file uses a module of tests/support.
OF_FOLDER = {"modules": "boltz", "runs": "boltz", "compat": "boltz", "install": "compile"}
OF_SUPPORT = {
    "ranks": "ranks",
    "forked": "predict",
    "predict_runs": "predict",
    "native": "native",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make quick` asks for."""
    parser.addoption("--without-boltz", action="store_true", help="fail where Boltz is imported")


def pytest_configure(config: pytest.Config) -> None:
    """Make Boltz impossible to import, if asked for."""
    if config.getoption("--without-boltz"):
        sys.modules["boltz"] = None  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders, and give tests the markers of their folder and of what their file uses."""
    place = {folder: at for at, folder in enumerate(ORDER)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(place)))
    for item in items:
        used = {getattr(x, "__module__", "") for x in vars(item.module).values()}  # type: ignore[attr-defined]
        used |= set(vars(item.module))  # type: ignore[attr-defined]
        names = {name for module, name in OF_SUPPORT.items() if module in used}
        names |= {name for folder, name in OF_FOLDER.items() if folder == item.path.parent.name}
        for name in sorted(names):
            item.add_marker(name)


@pytest.fixture(autouse=True)
def _no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test of the quick tier where it starts a process and is not marked so."""
    if request.path.parent.name not in QUICK or request.node.get_closest_marker("process"):
        return

    popen = subprocess.Popen.__init__

    def refused(*_: Any, **__: Any) -> Any:
        pytest.fail("this test starts a process: mark it `process`, or move it to another folder")

    def only_git(self: Any, command: Any, *args: Any, **options: Any) -> None:
        # Benches ask it for the commit.
        (popen if command[0] == "git" else refused)(self, command, *args, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", only_git)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
    monkeypatch.setattr(os, "fork", refused)


@pytest.fixture(autouse=True)
def _no_seed_left() -> Iterator[None]:
    """Take Lightning's seed out of the environment: processes of later tests would inherit it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that lives as long as the session; `parity.prepare` keeps its results in it."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for `boltz predict --cache`: molecules, Boltz-2, its affinity model and Boltz-1."""
    from bench.synthetic import FILE_NAMES, make_cache

    return make_cache(tmp_path_factory.mktemp("cache"), "tiny", list(FILE_NAMES))


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose trunk has few blocks, for the runs of forked.py."""
    from forked import BLOCKS

    from bench.synthetic import make_cache

    return make_cache(tmp_path_factory.mktemp("small"), "tiny", blocks=BLOCKS)


@pytest.fixture(scope="session")
def prepared(session_folder: Path) -> Callable[[str], Prepared]:
    """Prepare an example by name: `prepared("heterodimer")`."""
    from parity import EXAMPLES, prepare

    return lambda name: prepare(session_folder, EXAMPLES / f"{name}.yaml")
