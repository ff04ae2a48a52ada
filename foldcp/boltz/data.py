"""Data modules: the root rank featurises, every rank receives its features and random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from boltz.data.module.inferencev2 import Boltz2InferenceDataModule, PredictionDataset, collate
from torch.utils.data import DataLoader

from foldcp.boltz import features
from foldcp.boltz.run import current

FAILED = "foldcp_failed"  # key of a batch without features: why there are none


class RootDataModule(Boltz2InferenceDataModule):
    """Boltz-2's data module with compact features, made on the root rank only.

    The affinity pass keeps stock features; it runs on the root rank alone.
    """

    def predict_dataloader(self) -> DataLoader:
        """The inputs, one per batch; on other ranks than the root only their numbers."""
        run = current()
        if run is None or self.affinity:
            return super().predict_dataloader()
        if not run.mesh.is_root:
            return DataLoader(range(len(self.manifest.records)), batch_size=None)
        stock = super().predict_dataloader()
        features.install(stock.dataset)
        stock.dataset.__class__ = OncePerInput
        return DataLoader(
            stock.dataset,
            batch_size=1,
            shuffle=False,
            num_workers=self.num_workers,
            pin_memory=run.mesh.device.type == "cuda",
            collate_fn=collate_or_failed,
        )

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
        if run is not None and run.shared:
            root = run.mesh.is_root
            batch, state = run.mesh.broadcast_object((batch, random_state()) if root else None)
            if not root:
                set_random_state(state)
        if run is not None and FAILED in batch:
            if run.mesh.is_root:
                run.failed[batch["record"][0].id] = batch[FAILED]
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


class OncePerInput(PredictionDataset):
    """Boltz-2's dataset, except that an input that fails is reported and not replaced.

    Stock answers a failure with the features of input 0, for ever when input 0 is the one.
    """

    _busy = False

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Features of one input, or `FAILED` and the reason."""
        if self._busy:
            raise RuntimeError("its features could not be computed, see the message above")
        self._busy = True
        try:
            return super().__getitem__(idx)
        except Exception as error:  # whatever stops one input must not stop the others
            return {"record": self.manifest.records[idx], FAILED: f"{error}"}
        finally:
            self._busy = False


def collate_or_failed(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Boltz-2's collate for one input, which may be one that failed."""
    if FAILED in items[0]:
        return {"record": [items[0]["record"]], FAILED: items[0][FAILED]}
    return collate(items)


def random_state() -> tuple[Any, ...]:
    """State of the generators that a prediction draws from: torch CPU and CUDA, numpy, python."""
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
