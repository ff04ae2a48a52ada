"""The alignments of the input that is being read: where they lie, and what each was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Alignments:
    """Alignments of one input.

    Args:
        unpacked: folder for unpacked files, removed with what is left of the input; None: files
            are taken as they are.
        answers: folder that keeps complete answers of the MSA server; None: none are kept.
        read: files that were parsed, in order.
        made: what files in `unpacked` were made of.
    """

    unpacked: Path | None = None
    answers: Path | None = None
    read: list[Path] = field(default_factory=list)
    made: dict[Path, Path] = field(default_factory=dict)

    def source(self, path: Path) -> Path:
        """Return the user's file that one was made of, or itself."""
        return self.made.get(path, path)
