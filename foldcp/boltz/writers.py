"""Writers: the root rank writes each prediction whole or not at all, then all ranks meet."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boltz.data.write.writer import BoltzAffinityWriter, BoltzWriter

from foldcp.boltz.data import FAILED
from foldcp.boltz.run import current
from foldcp.report import UserError


class _RootWriter:
    """Mixin over one of Boltz's writers."""

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: dict[str, Any],
        batch_indices: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one prediction on the root rank; the others wait until it is on disk."""
        run = current()

        def write() -> None:
            super(_RootWriter, self).write_on_batch_end(
                trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
            )

        if run is None:
            write()
            return
        if run.mesh.is_root:
            record_id = batch["record"][0].id
            if prediction["exception"] and FAILED not in batch:
                run.failed[record_id] = "out of memory: use more ranks or fewer samples in parallel"
            self._write_whole(record_id, write)
        if run.shared:
            run.mesh.barrier()

    def _write_whole(self, record_id: str, write: Callable[[], None]) -> None:
        final: Path = self.output_dir
        partial = final.parent / f".partial_{record_id}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            self.output_dir = partial
            write()
            move_into(partial / record_id, final / record_id)
        except OSError as error:
            raise UserError(
                f"the prediction of {record_id} could not be written to {final} "
                f"({error.strerror or error}): free the disk or pass another --out_dir; earlier "
                "predictions are kept and skipped by the next run"
            ) from error
        finally:
            self.output_dir = final
            shutil.rmtree(partial, ignore_errors=True)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the number of failed inputs, on the root rank."""
        run = current()
        if run is None or run.mesh.is_root:
            super().on_predict_epoch_end(trainer, pl_module)


class RootWriter(_RootWriter, BoltzWriter):
    """Boltz's structure writer on the root rank."""


class RootAffinityWriter(_RootWriter, BoltzAffinityWriter):
    """Boltz's affinity writer on the root rank."""


def move_into(source: Path, target: Path) -> None:
    """Move a folder to `target`, in one step when that does not exist yet, else file by file."""
    if not source.exists():
        return
    if not target.exists():
        os.rename(source, target)
        return
    for path in sorted(source.iterdir()):
        os.replace(path, target / path.name)
