"""Writers: the root rank writes each prediction whole or not at all, then all ranks go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from boltz.data.write.writer import BoltzAffinityWriter, BoltzWriter

from foldcp.boltz.run import Run, current
from foldcp.errors import InputLost
from foldcp.modules.hooks import Folded, KeptTrunk, Sizes
from foldcp.output.folders import Matrices, Outputs, move_into, not_written
from foldcp.output.spool import Spool
from foldcp.runtime.files.names import Unsafe
from foldcp.runtime.recovery import together

# Seconds in which what is complete may still get to disk, in a run that ends early.
_INTERRUPTED, _FAILED = 2.0, 5.0
_NUMBER = 4  # bytes of a number in a matrix


@dataclass(frozen=True)
class _Known:
    """An input that stock predicted, see `foldcp.runtime.recovery.Input`."""

    name: str
    tokens: int


class _RootWriter:
    """Mixin over one of Boltz's writers."""

    output_dir: Path
    failed: int

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: dict[str, Any],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Be done with an input: write it, unless it was handed over.

        Args:
            trainer: unused.
            pl_module: unused.
            prediction: stock's prediction dict.
            batch_indices: unused.
            batch: what the model was given.
            batch_idx: unused.
            dataloader_idx: unused.
        """
        run = current()
        if run is None:
            self._stock(prediction, batch)
        else:
            self._done(run, prediction, batch)

    def _done(self, run: Run, prediction: dict[str, Any], batch: Any) -> None:
        """Write a prediction of stock's model, which the root rank alone runs."""
        one = _Known(batch["record"][0].id, batch["token_index"].shape[1])
        run.session.at(f"writing of {one.name}")
        if prediction["exception"]:  # stock swallows the error of what it runs itself
            run.failed.setdefault(one.name, "out of memory: use more ranks or fewer samples")
            self._stock(prediction, batch)  # counts it
        else:
            together(run, one, lambda: self._try(run, one.name, prediction, batch))

    def _try(
        self,
        run: Run,
        record_id: str,
        prediction: dict[str, Any],
        batch: dict[str, Any],
        spool: Spool | None = None,
    ) -> None:
        """Write a prediction, on the root rank; a disk that refuses fails the input."""
        try:
            self._write(run, record_id, prediction, batch, spool)
        except (OSError, Unsafe) as error:
            self._fail(run, record_id, not_written(self.output_dir, error))

    def _write(
        self,
        run: Run,
        record_id: str,
        prediction: dict[str, Any],
        batch: dict[str, Any],
        spool: Spool | None = None,
    ) -> None:
        raise NotImplementedError

    def _stock(self, prediction: dict[str, Any], batch: Any) -> None:
        """Have stock write."""
        super().write_on_batch_end(None, None, prediction, [0], batch, 0, 0)  # type: ignore[misc]

    def _fail(self, run: Run, record_id: str, reason: str) -> None:
        run.failed[record_id] = reason
        self.failed += 1

    def _into(self, folder: Path, prediction: dict[str, Any], batch: dict[str, Any]) -> None:
        """Have stock write to another folder than its own."""
        final, self.output_dir = self.output_dir, folder
        try:
            self._stock(prediction, batch)
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
        self._kept: dict[str, KeptTrunk] = {}

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to take predictions.

        Args:
            trainer: unused.
            pl_module: unused.
        """
        run = current()
        if run is not None:
            self._outputs = Outputs(
                self.output_dir, lambda name, why: self._fail(run, name, why), run.seal
            )

    def open_outputs(self, record_id: str, sizes: Sizes) -> Spool | None:
        """Begin to write a prediction; every rank of the mesh calls it.

        Args:
            record_id: of the input.
            sizes: numbers in each matrix.

        Returns:
            What takes the matrices, on the root rank.

        Raises:
            InputLost: on every rank: the prediction cannot be written.
        """
        run = current()
        assert run is not None and self._outputs is not None
        spool, reason = None, ""
        if run.writes:
            try:
                needed = {key: _NUMBER * count for key, count in sizes.items()}
                spool = self._outputs.spool(record_id, needed)
            except OSError as error:
                reason = not_written(self.output_dir, error)
        reason = run.mesh.ranks.broadcast_object(reason)
        if reason:
            raise InputLost(reason)
        return spool

    def hand_over(self, record_id: str, folded: Folded, prediction: dict[str, Any] | None) -> None:
        """Write a prediction; every rank of the mesh calls it.

        Args:
            record_id: of the input.
            folded: what was predicted.
            prediction: stock's prediction dict, on the root rank.
        """
        run = current()
        assert run is not None
        if prediction is not None:
            spool = folded.sink
            assert spool is None or isinstance(spool, Spool)
            self._try(run, record_id, prediction, folded.feats, spool)
        if folded.kept is not None:
            self._kept[record_id] = folded.kept
            self._forget_trunks(run)

    def discard(self, record_id: str) -> None:
        """Give up a prediction that is not complete."""
        run = current()
        if run is not None and run.writes and self._outputs is not None:
            self._outputs.discard(record_id)

    def _done(self, run: Run, prediction: dict[str, Any], batch: Any) -> None:
        """Count an input of a model on the mesh: `hand_over` has written it if it was folded."""
        if run.alone:
            super()._done(run, prediction, batch)
            return
        if run.writes and prediction["exception"]:
            self.failed += 1
        if run.watching is not None:
            run.watching.finished(run.writes)

    def _write(
        self,
        run: Run,
        record_id: str,
        prediction: dict[str, Any],
        batch: dict[str, Any],
        spool: Spool | None = None,
    ) -> None:
        outputs = self._outputs
        assert outputs is not None
        try:
            folder = outputs.partial(record_id) if spool else outputs.begin(record_id)
            self._into(folder, prediction, batch)
        except BaseException:
            outputs.discard(record_id)
            raise
        if spool is None:
            outputs.complete(record_id)
            return
        s = prediction["s"].cpu().numpy() if self.write_embeddings else None
        outputs.complete(record_id, Matrices(spool, sample_ranks(prediction), s))

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
                if run.shared:  # however long that takes
                    place = f"outputs/{run.session.group}/{run.session.epoch}"
                    run.session.meet(place, run.mesh.size)
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
        self,
        run: Run,
        record_id: str,
        prediction: dict[str, Any],
        batch: dict[str, Any],
        spool: Spool | None = None,
    ) -> None:
        outputs = Outputs(self.output_dir, lambda *_: None, run.seal)
        partial = outputs.begin(record_id)
        try:
            self._into(partial, prediction, batch)
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
