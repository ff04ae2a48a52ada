"""Test session: repository root importable, one thread, uninitialised memory poisoned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

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
