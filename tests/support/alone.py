"""A prediction under way on one rank, without the command line around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from foldcp.boltz.run import Run, set_current
from foldcp.config import Config
from foldcp.fabric.mesh import Mesh


@contextmanager
def prediction() -> Iterator[Run]:
    """The run that the patched parts of Boltz then find."""
    session = SimpleNamespace(is_root=True, stage="", group=0, epoch=0)
    session.at, session.wait_for_root = (lambda stage: None), (lambda: None)
    session.from_root = lambda value: value
    run = Run(Config(), session, Mesh.create(1, 1, torch.device("cpu")))
    set_current(run)
    try:
        yield run
    finally:
        set_current(None)
