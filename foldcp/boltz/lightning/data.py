"""Data modules: the root rank featurises; `input_hooks` gives its features to every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltz.data import types
from boltz.data.module.inferencev2 import Boltz2InferenceDataModule, PredictionDataset, collate
from torch.utils.data import DataLoader

from foldcp.boltz.features.boltz2 import CompactFeaturizer
from foldcp.boltz.run import Run, current
from foldcp.errors import SEE_LOG
from foldcp.fabric.message import known
from foldcp.runtime import sharing

# What Boltz knows of an input besides its features, as it travels between ranks.
for _kind in (
    types.Manifest, types.Record, types.StructureInfo, types.ChainInfo, types.InterfaceInfo,
    types.InferenceOptions, types.TemplateInfo, types.MDInfo, types.AffinityInfo,
):  # fmt: skip
    known(_kind)


@known
@dataclass(frozen=True)
class Failed:
    """An input without features, in the place of its batch.

    Args:
        name: of the input.
        reason: why there are none.
    """

    name: str
    reason: str


# What the loader of a rank gives: features or why there are none, elsewhere the input's number.
Batch = dict[str, Any] | Failed | int


class RootData:
    """Mixin over one of Boltz's data modules: compact features, made on the root rank only."""

    affinity = False
    num_workers: int
    trainer: Any
    featurizer: Any  # takes the place of stock's
    dataset: type  # stock's, each of whose inputs is read once

    def predict_dataloader(self) -> DataLoader:
        """Load the inputs, one per batch; on other ranks than the root only their numbers."""
        run = current()
        if run is None or self.affinity:
            return super().predict_dataloader()
        owner = owners(run, self.manifest.records, self.target_dir)
        if not run.mesh.is_root:
            return DataLoader(range(owner.count(run.session.group)), batch_size=None)
        stock = super().predict_dataloader()
        dataset = stock.dataset
        self.featurizer.install(dataset)
        dataset.__class__ = self.dataset
        loader = DataLoader(
            stock.dataset,
            batch_size=1,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=run.mesh.device.type == "cuda",
            collate_fn=collate_or_failed,
        )
        if run.session.groups == 1:
            return loader
        step = self.trainer.lightning_module.predict_step

        def replay(batch: Batch) -> None:
            if not isinstance(batch, Failed):
                step.replay(batch)

        return sharing.Share(loader, owner, run.session.group, replay)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch that stock's model takes; the tiled ones take theirs as the loader has it.

        Args:
            batch: features on the root rank, an input's number on the others.
            device: of this rank.
            dataloader_idx: not used.
        """
        run = current()
        if run is not None and not run.alone:
            return batch
        if run is not None:
            run.at(f"affinity of {batch['record'][0].id}")
        return self.moved(batch, device)

    def moved(self, feats: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Move features to a device as stock does.

        Args:
            feats: collated; changed in place.
            device: of this rank.
        """
        return super().transfer_batch_to_device(feats, device, 0)


def owners(run: Run, records: Sequence[Any], structures: Path) -> list[int]:
    """Assign each input to a data-parallel group, on the root rank; every rank calls it.

    Args:
        run: the prediction.
        records: of the inputs.
        structures: folder of processed structures.
    """
    session, groups = run.session, run.session.groups
    if run.watching is not None:
        run.watching.expect(len(records))
    found = None
    if session.is_root:
        several = groups > 1
        sizes = [sharing.tokens(structures / f"{r.id}.npz") if several else 1 for r in records]
        found = sharing.assign(sizes, groups)
    return session.from_root(found)


def once(getitem: Callable[[Any, int], dict[str, Any]]) -> Callable[[Any, int], Batch]:
    """Wrap `__getitem__` of one of Boltz's datasets: an input that fails is not replaced.

    Stock answers a failure with the features of input 0, for ever when input 0 is the one.

    Args:
        getitem: stock's, which calls itself after a failure.

    Returns:
        The method: features of one input, or `Failed`.
    """
    busy = False

    def __getitem__(self: Any, idx: int) -> Batch:
        nonlocal busy
        if busy:
            raise RuntimeError(f"its features could not be computed, {SEE_LOG}")
        busy = True
        try:
            return getitem(self, idx)
        except Exception as error:  # whatever stops one input must not stop the others
            return Failed(self.manifest.records[idx].id, str(error) or repr(error))
        finally:
            busy = False

    return __getitem__


class OncePerInput(PredictionDataset):
    """Boltz-2's dataset; the class of a stock dataset can be replaced by it."""

    __getitem__ = once(PredictionDataset.__getitem__)


def collate_or_failed(items: list[Batch]) -> Batch:
    """Collate one input as Boltz-2 does; it may be one that failed."""
    return items[0] if isinstance(items[0], Failed) else collate(items)


def random_state() -> tuple[Any, ...]:
    """Return the state of all generators of a prediction: torch CPU and CUDA, numpy, python."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Continue from a state returned by `random_state`, on this rank's CUDA device if any."""
    cpu, cuda, of_numpy, of_python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


class RootDataModule(RootData, Boltz2InferenceDataModule):
    """Boltz-2's data module; the affinity pass keeps stock features, on the root rank alone."""

    featurizer, dataset = CompactFeaturizer, OncePerInput
