"""The prediction under way: what the patched parts of boltz.main share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from foldcp.config import Config

if TYPE_CHECKING:
    from foldcp.boltz.session import Session
    from foldcp.mesh import Mesh


@dataclass
class Run:
    """One `boltz predict`.

    Args:
        config: the FOLDCP_* variables.
        session: the ranks of this run.
        mesh: their layout.
        write_embeddings: `--write_embeddings` was given.
        reasons: folder where input-reading processes leave why an input could not be read.
        failed: inputs that could not be folded and why; complete on the root rank only.
        alone: the model under way runs stock on the root rank while the others wait.
        with_affinity: some input asks for an affinity prediction.
        announced: the start line was printed.
    """

    config: Config
    session: Session
    mesh: Mesh
    write_embeddings: bool = False
    reasons: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    with_affinity: bool = False
    announced: bool = False

    @property
    def shared(self) -> bool:
        """True when all ranks work on the model under way together."""
        return self.mesh.size > 1 and not self.alone


_current: Run | None = None


def current() -> Run | None:
    """The prediction under way; None outside of one, where everything stays stock."""
    return _current


def set_current(run: Run | None) -> None:
    """Begin (or, with None, end) a prediction."""
    global _current
    _current = run
