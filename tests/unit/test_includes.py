"""Includes of csrc go one way: wire <- engine <- transports/nccl <- transports <- operators."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

from native import CSRC

LEVELS = ("wire", "engine", "transports/nccl", "transports", ".")  # "." are the operators
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])(.+?)[">]', re.M)


def test_includes_go_one_way() -> None:
    """Each is named by its path in csrc; only the operators know torch; there is no circle."""
    graph: dict[str, set[str]] = {}
    for path in (path for path in CSRC.rglob("*") if path.is_file()):
        level = LEVELS.index(str(path.parent.relative_to(CSRC)))
        name = str(path.relative_to(CSRC))
        graph[name] = set()
        for kind, included in INCLUDE.findall(path.read_text()):
            if kind == "<":
                assert level == len(LEVELS) - 1 or not included.startswith("torch/"), name
                continue
            assert (CSRC / included).is_file(), f"{name} includes {included}, a path not in csrc"
            upward = LEVELS.index(str(Path(included).parent)) > level
            assert not upward, f"{name} includes {included}, of a higher level"
            graph[name].add(included)
    assert sum(map(len, graph.values())) > 30
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_folders_and_files_are_small() -> None:
    for path in (CSRC, *CSRC.rglob("*")):
        if path.is_dir():
            assert len(list(path.iterdir())) <= 12, path
        else:
            assert len(path.read_text().splitlines()) <= 300, path
