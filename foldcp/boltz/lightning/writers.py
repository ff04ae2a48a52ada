"""Writers: the root rank writes each prediction whole or not at all, then all ranks go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from boltz.data.write.writer import BoltzAffinityWriter, BoltzWriter

from foldcp.boltz.lightning.data import FAILED
from foldcp.boltz.run import Run, current
from foldcp.modules.sink import MatrixSink
from foldcp.output.folders import SPOOL, Matrices, Outputs, move_into, not_written
from foldcp.output.spool import Key
from foldcp.runtime.files.names import Unsafe
from foldcp.runtime.recovery import together

# Seconds in which what is complete may still get to disk, in a run that ends early.
_INTERRUPTED, _FAILED = 2.0, 5.0
_NUMBER = 4  # bytes of a number in a matrix
_epochs = itertools.count()


class _RootWriter:
    """Mixin over one of Boltz's writers."""

    output_dir: Path
    failed: int
    # (run, id, prediction, what stock writes): writes a prediction, on the root rank.
    _write: Callable[[Run, str, dict[str, Any], Callable[[], None]], None]

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
        """Write one prediction on the root rank, while the others wait."""
        run = current()

        def write() -> None:
            super(_RootWriter, self).write_on_batch_end(
                trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
            )

        if run is None:
            write()
            return
        record_id = batch["record"][0].id if run.writes else ""
        if run.writes and prediction["exception"] and FAILED not in batch:
            # Stock swallows the error of what it runs itself.
            run.failed.setdefault(record_id, "out of memory: use more ranks or fewer samples")

        def work() -> None:
            if run.writes:
                try:
                    self._write(run, record_id, prediction, write)
                except (OSError, Unsafe) as error:
                    self._fail(run, record_id, not_written(self.output_dir, error))
            self._wrote(run, record_id, prediction)

        run.session.at(f"writing of {record_id}")
        tokens = batch["token_index"].shape[1] if "token_index" in batch else 0
        together(run, record_id, tokens, work)
        if run.watching is not None and not run.alone:
            run.watching.finished(run.writes)

    def _fail(self, run: Run, record_id: str, reason: str) -> None:
        run.failed[record_id] = reason
        self.failed += 1

    def _wrote(self, run: Run, record_id: str, prediction: dict[str, Any]) -> None:
        """Agree among all ranks on the outcome after the root has written."""

    def _into(self, folder: Path, write: Callable[[], None]) -> None:
        """Have stock write to another folder than its own."""
        final, self.output_dir = self.output_dir, folder
        try:
            write()
        finally:
            self.output_dir = final

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the number of failed inputs, on the root rank."""
        run = current()
        if run is None or run.writes:
            super().on_predict_epoch_end(trainer, pl_module)


class RootWriter(_RootWriter, BoltzWriter):
    """Boltz's structure writer on the root rank; matrices in a spool are finished beside it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._outputs: Outputs | None = None
        self._expected: list[Key] = []
        self._kept: dict[str, Any] = {}

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the model under way send its matrices here.

        Args:
            trainer: unused.
            pl_module: the model.
        """
        run = current()
        if run is None:
            return
        self._outputs = Outputs(
            self.output_dir, lambda name, why: self._fail(run, name, why), run.seal
        )
        if not run.alone:
            pl_module.foldcp_open_sink = self.open_sink

    def open_sink(
        self,
        record_id: str,
        tokens: int,
        samples: int,
        channels: int,
        errors: Sequence[str] = ("pae", "pde"),
    ) -> tuple[bool, MatrixSink | None]:
        """Begin to write a prediction; every rank of the mesh calls it.

        Args:
            record_id: of the input.
            tokens: N.
            samples: M, those whose errors are predicted.
            channels: of the pair representation; 0 when it is not asked for.
            errors: names of the matrices that each sample has.

        Returns:
            Whether the prediction can be written (otherwise `run.failed` says why not), and on the
            root rank what takes its matrices.
        """
        run = current()
        assert run is not None and self._outputs is not None
        sink = None
        if run.writes:
            square = _NUMBER * tokens**2
            sizes = {(name, m): square for name in errors for m in range(samples)}
            if channels:
                sizes["z", 0] = square * channels
            try:
                sink = self._outputs.spool(record_id, list(sizes.values()))
                self._expected = list(sizes)
            except OSError as error:
                run.failed[record_id] = not_written(self.output_dir, error)
        return run.mesh.ranks.broadcast_object(sink is not None), sink

    def _write(
        self, run: Run, record_id: str, prediction: dict[str, Any], write: Callable[[], None]
    ) -> None:
        outputs = self._outputs
        assert outputs is not None
        if prediction["exception"]:
            outputs.discard(record_id)
            write()  # stock counts it
            return
        spool = prediction.pop(SPOOL, None)
        try:
            self._into(outputs.partial(record_id) if spool else outputs.begin(record_id), write)
        except BaseException:
            outputs.discard(record_id)
            raise
        if spool is None:
            outputs.complete(record_id)
            return
        s = prediction["s"].cpu().numpy() if self.write_embeddings else None
        outputs.complete(record_id, Matrices(spool, self._expected, sample_ranks(prediction), s))

    def _wrote(self, run: Run, record_id: str, prediction: dict[str, Any]) -> None:
        if run.keeper is None or run.alone:
            return
        (name, failed) = run.mesh.ranks.broadcast_object((record_id, prediction["exception"]))
        kept = run.keeper.take()
        if kept is not None and not failed:
            self._kept[name] = kept
        self._forget_trunks(run)

    def _forget_trunks(self, run: Run) -> None:
        """Drop the kept trunks of what is on disk; the ranks of the mesh call it together."""
        outputs = self._outputs
        done = outputs.finished() if run.writes and outputs is not None else None
        for name in run.mesh.ranks.broadcast_object(done):
            if name in self._kept:
                self._kept.pop(name).drop()

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait until every prediction is on disk, then print the number of failed inputs.

        Args:
            trainer: unused.
            pl_module: unused.
        """
        run = current()
        if run is not None and self._outputs is not None:
            run.session.at("writing")
            if run.writes:
                self._outputs.finish()
            if run.keeper is not None and not run.alone:
                place = f"{run.session.group}/{run.session.epoch}/{next(_epochs)}"
                if run.shared:
                    run.session.meet(f"outputs/{place}", run.mesh.size)  # however long that takes
                self._forget_trunks(run)
        super().on_predict_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Get to disk what is complete, before the run ends.

        Args:
            trainer: unused.
            pl_module: unused.
            exception: what ended the run.
        """
        run = current()
        if run is not None and run.writes and self._outputs is not None:
            stopped = isinstance(exception, KeyboardInterrupt)
            self._outputs.finish(_INTERRUPTED if stopped else _FAILED)


class RootAffinityWriter(_RootWriter, BoltzAffinityWriter):
    """Boltz's affinity writer on the root rank: one small file in the prediction's folder."""

    def _write(
        self, run: Run, record_id: str, prediction: dict[str, Any], write: Callable[[], None]
    ) -> None:
        outputs = Outputs(self.output_dir, lambda *_: None, run.seal)
        partial = outputs.begin(record_id)
        try:
            self._into(partial, write)
            if (partial / record_id).exists():
                outputs.check_ours()
                move_into(partial / record_id, self.output_dir / record_id)
        finally:
            outputs.discard(record_id)


def sample_ranks(prediction: dict[str, Any]) -> list[int]:
    """Rank of each sample by confidence, as Boltz's writer has it: 0 is the best."""
    if "confidence_score" not in prediction:
        return []
    order = torch.argsort(prediction["confidence_score"], descending=True).tolist()
    return [order.index(sample) for sample in range(len(order))]
