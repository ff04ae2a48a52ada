"""Data modules: the root rank featurises, every rank receives its features and random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boltz.data import types
from boltz.data.module.inferencev2 import Boltz2InferenceDataModule, PredictionDataset, collate
from torch.utils.data import DataLoader

from foldcp.boltz.features import boltz2 as features
from foldcp.boltz.run import Run, current
from foldcp.errors import SEE_LOG
from foldcp.fabric.message import known
from foldcp.runtime import sharing
from foldcp.runtime.recovery import together

# What Boltz knows of an input besides its features, as it travels between ranks.
for _kind in (
    types.Manifest, types.Record, types.StructureInfo, types.ChainInfo, types.InterfaceInfo,
    types.InferenceOptions, types.TemplateInfo, types.MDInfo, types.AffinityInfo,
):  # fmt: skip
    known(_kind)

FAILED = "foldcp_failed"  # key of a batch without features: why there are none


class RootData:
    """Mixin over one of Boltz's data modules: compact features, made on the root rank only."""

    affinity = False
    num_workers: int
    # Makes one of stock's datasets hand out compact features, each input's once.
    compact: Callable[[Any], None]

    def predict_dataloader(self) -> DataLoader:
        """Load the inputs, one per batch; on other ranks than the root only their numbers."""
        run = current()
        if run is None or self.affinity:
            return super().predict_dataloader()
        owner = owners(run, self.manifest.records, self.target_dir)
        if not run.mesh.is_root:
            return DataLoader(range(owner.count(run.session.group)), batch_size=None)
        stock = super().predict_dataloader()
        self.compact(stock.dataset)
        loader = DataLoader(
            stock.dataset,
            batch_size=1,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=run.mesh.device.type == "cuda",
            collate_fn=collate_or_failed,
        )
        return shared_out(run, loader, owner)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Give every rank the root's batch and random state, then move the batch.

        Args:
            batch: features on the root rank, an input's number on the others.
            device: of this rank.
            dataloader_idx: not used.

        Returns:
            The batch on `device`. One that holds `FAILED` has no features.
        """
        run = current()
        move = super().transfer_batch_to_device
        if run is not None and run.alone:
            run.at(f"affinity of {batch['record'][0].id}")
        if run is None or run.alone:
            return move(batch, device, dataloader_idx)
        return share(run, batch, lambda x: move(x, device, dataloader_idx))


class RootDataModule(RootData, Boltz2InferenceDataModule):
    """Boltz-2's data module; the affinity pass keeps stock features, on the root rank alone."""

    def compact(self, dataset: Any) -> None:
        """Make the dataset hand out compact features, each input's once."""
        features.install(dataset)
        dataset.__class__ = OncePerInput


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


def shared_out(run: Run, loader: DataLoader, owner: list[int]) -> Any:
    """Make the loader of this group's inputs, see `sharing.Share`.

    Args:
        run: the prediction.
        loader: of all inputs, one a batch.
        owner: group of each input.
    """
    if run.session.groups == 1:
        return loader

    def replay(batch: dict[str, Any]) -> None:
        if FAILED not in batch and run.replay is not None:
            run.replay(batch)

    return sharing.Share(loader, owner, run.session.group, replay)


def share(run: Run, batch: Any, move: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Give every rank of a mesh the features and random state of its root, then move them.

    Args:
        run: the prediction.
        batch: features on the root rank, an input's number on the others.
        move: brings a batch to this rank's device.

    Returns:
        The moved batch. One that holds `FAILED` has no features.
    """
    root = run.mesh.is_root
    name = batch["record"][0].id if root else f"input {batch}"
    run.session.at(f"sharing the features of {name}")
    got: dict[str, Any] = {}

    def work() -> dict[str, Any]:
        nonlocal got
        got = batch
        if run.shared:
            sent = (batch, random_state()) if root else None
            got, state = run.mesh.ranks.broadcast_object(sent)
            if not root:
                set_random_state(state)
        return got if FAILED in got else move(got)

    moved = together(run, name, 0, work)
    if moved is None:
        record = got.get("record") if got else (batch["record"] if root else None)
        return {"record": record, FAILED: run.failed[name]}
    if FAILED in moved and root:
        run.failed[name] = moved[FAILED]
    return moved


def once(getitem: Callable[[Any, int], dict[str, Any]]) -> Callable[[Any, int], dict[str, Any]]:
    """Wrap `__getitem__` of one of Boltz's datasets: an input that fails is not replaced.

    Stock answers a failure with the features of input 0, for ever when input 0 is the one.

    Args:
        getitem: stock's, which calls itself after a failure.

    Returns:
        The method: features of one input, or `FAILED` and the reason.
    """
    busy = False

    def __getitem__(self: Any, idx: int) -> dict[str, Any]:
        nonlocal busy
        if busy:
            raise RuntimeError(f"its features could not be computed, {SEE_LOG}")
        busy = True
        try:
            return getitem(self, idx)
        except Exception as error:  # whatever stops one input must not stop the others
            return {"record": self.manifest.records[idx], FAILED: str(error) or repr(error)}
        finally:
            busy = False

    return __getitem__


class OncePerInput(PredictionDataset):
    """Boltz-2's dataset; the class of a stock dataset can be replaced by it."""

    __getitem__ = once(PredictionDataset.__getitem__)


def collate_or_failed(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate one input as Boltz-2 does; it may be one that failed."""
    if FAILED in items[0]:
        return {"record": [items[0]["record"]], FAILED: items[0][FAILED]}
    return collate(items)


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
