"""The prediction in progress, which the patched parts of boltz.main share.

Stock makes its writers, data modules, trainer and models by itself and hands nothing of ours to
them: so the run under way is process-wide, and they ask for it with `current`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from foldcp.boltz.inputs.alignments import Alignments
from foldcp.config import Config
from foldcp.config.precision import Precision

if TYPE_CHECKING:
    from foldcp.fabric.mesh import Mesh
    from foldcp.output.trunk_keeper import TrunkKeeper
    from foldcp.planner.plan import Plan
    from foldcp.runtime.files.seal import Seal
    from foldcp.runtime.screen.watching import Watching
    from foldcp.runtime.session import Session


@dataclass
class Run:
    """One `boltz predict`.

    Args:
        config: the FOLDCP_* variables.
        session: the ranks of this run.
        mesh: their layout.
        seed: `--seed`.
        write_embeddings: `--write_embeddings` was given.
        reasons: folder where input-reading processes leave why an input could not be read.
        failed: inputs that could not be folded and why; complete on the root rank at the end.
        alone: the model under way runs stock on the root rank while the others wait.
        with_affinity: some input asks for an affinity prediction.
        announced: the start line was printed.
        keeper: keeps the trunks of unfinished inputs (FOLDCP_RESUME).
        output_format: `--output_format`.
        apart: inputs are read in a process of their own.
        seal: of the lock of the results folder; None where nothing locks it, as in tests of parts.
        watching: shows how far the run is; None in tests of parts.
        tokens: N of each input that this rank has begun to fold.
        plans: what the planner expects of each input, on the root rank of its mesh.
        precision: of the structure model, None before it is loaded.
        known: inputs that could be read.
        asked: inputs of `known` that are folded now.
        scored: inputs of `known` that get an affinity now, as the root rank knows.
        structures: folder of their processed structures.
        alignments: of the input that is being read.
    """

    config: Config
    session: Session
    mesh: Mesh
    seed: int | None = None
    write_embeddings: bool = False
    reasons: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    with_affinity: bool = False
    announced: bool = False
    keeper: TrunkKeeper | None = None
    output_format: str = "mmcif"
    apart: bool = False
    seal: Seal | None = None
    watching: Watching | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    precision: Precision | None = None
    known: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    structures: Path = field(default_factory=Path)
    alignments: Alignments = field(default_factory=Alignments)

    def at(self, stage: str) -> None:
        """Say and show what this rank is doing, where no share of it is known."""
        if self.watching is None:
            self.session.at(stage)
        else:
            self.watching.stage(stage)

    @property
    def shared(self) -> bool:
        """True when all ranks of the mesh work on the model under way together."""
        return self.mesh.size > 1 and not self.alone

    @property
    def writes(self) -> bool:
        """True on the rank that writes the outputs of the inputs that its mesh folds."""
        return self.session.is_root if self.alone else self.mesh.is_root


_current: Run | None = None


def current() -> Run | None:
    """Return the prediction in progress; None outside of one, where everything stays stock."""
    return _current


def set_current(run: Run | None) -> None:
    """Begin (or, with None, end) a prediction."""
    global _current
    _current = run
