"""Boltz-1's data module: the root rank featurises, every rank receives its features."""

from __future__ import annotations

from boltz.data.module.inference import BoltzInferenceDataModule, PredictionDataset

from foldcp.boltz.features.boltz1 import CompactFeaturizer
from foldcp.boltz.lightning.data import RootData, once


class OncePerInput(PredictionDataset):
    """Boltz-1's dataset; the class of a stock dataset can be replaced by it."""

    __getitem__ = once(PredictionDataset.__getitem__)


class RootBoltz1DataModule(RootData, BoltzInferenceDataModule):
    """Boltz-1's data module."""

    featurizer, dataset = CompactFeaturizer, OncePerInput
