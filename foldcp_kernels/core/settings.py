"""Hold what a user sets for all ops: the implementation that they run, and the size of a chunk.

These settings belong to the process, neither to a thread nor to a context (`contextvars`): on a GPU
autograd runs the backward in threads of its own, which know no context of the caller, and what is
computed again there must be computed as the forward was.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """Settings of all ops of a process.

    Args:
        impl: what runs where a call names nothing, one of `dispatch.IMPLS` but "reference".
        chunk_bytes: transient memory of one chunk, None for the default of each device.
    """

    impl: str = "auto"
    chunk_bytes: int | None = None


SETTINGS = Settings()
