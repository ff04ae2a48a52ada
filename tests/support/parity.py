"""Stock Boltz-2 without its command line, as the model parity tests need it.

A test prepares an input once (`prepare`), takes stock's dense features and ours under one seed,
builds a stock model with untrained weights (`build_model`) and compares what stock returns
(`stock_outputs`) with what the swapped model returns. Under `everything_float64` both run in
float64 throughout, so that a wrong term of 1e-9 shows; `perturbed` measures how far stock's own
outputs move, which is what float32 tolerances are derived from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import boltz.main
import torch
import yaml
from boltz.data.module.inferencev2 import PredictionDataset, collate
from boltz.data.types import Manifest
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.synthetic import checkpoint
from bench.synthetic.molecules import write_molecules

EXAMPLES = Path(__file__).parents[2] / "examples" / "inputs"


@dataclass(frozen=True)
class Prepared:
    """One input after Boltz's own preprocessing."""

    molecules: Path
    processed: Path

    def dataset(self) -> PredictionDataset:
        """Return a new stock dataset of this one input."""
        extra = {
            name: self.processed / folder if (self.processed / folder).exists() else None
            for name, folder in (
                ("constraints_dir", "constraints"),
                ("template_dir", "templates"),
                ("extra_mols_dir", "mols"),
            )
        }
        return PredictionDataset(
            manifest=Manifest.load(self.processed / "manifest.json"),
            target_dir=self.processed / "structures",
            msa_dir=self.processed / "msa",
            mol_dir=self.molecules,
            **extra,
        )


def prepare(folder: str | Path, yaml_path: str | Path) -> Prepared:
    """Run Boltz's preprocessing on one YAML file, once per folder and content.

    Args:
        folder: session folder; holds the molecules and the results, reused when present, so ranks
            may call this again after the parent process has.
        yaml_path: the input; relative msa and template paths are taken from the repository root.
    Returns:
        The input, ready for `stock_features` and `compact_features`.
    Raises:
        RuntimeError: Boltz printed an error and skipped the input.
    """
    return _prepare(Path(folder), Path(yaml_path).read_text(), Path(yaml_path).stem)


@lru_cache
def _prepare(folder: Path, text: str, stem: str) -> Prepared:
    molecules = folder / "mols"
    if not (folder / "mols.tar").exists():  # written last
        write_molecules(folder)
    target = folder / f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    prepared = Prepared(molecules, target / "processed")
    if (prepared.processed / "manifest.json").exists():
        return prepared
    target.mkdir(parents=True, exist_ok=True)
    copied = target / f"{stem}.yaml"
    copied.write_text(yaml.safe_dump(_absolute_paths(yaml.safe_load(text)), sort_keys=False))
    boltz.main.process_inputs(
        data=[copied],
        out_dir=target,
        ccd_path=folder / "ccd.pkl",
        mol_dir=molecules,
        msa_server_url="",
        msa_pairing_strategy="greedy",
        boltz2=True,
    )
    if not Manifest.load(prepared.processed / "manifest.json").records:
        raise RuntimeError(f"Boltz skipped {stem}.yaml; its message is in the captured output")
    return prepared


def _absolute_paths(schema: dict[str, Any]) -> dict[str, Any]:
    """Boltz resolves paths against the working folder, which tests must not depend on."""
    root = EXAMPLES.parent.parent
    for entry in schema["sequences"]:
        for chain in entry.values():
            if chain.get("msa", "empty") != "empty":
                chain["msa"] = str(root / chain["msa"])
    for template in schema.get("templates", []):
        for key in {"cif", "pdb"} & template.keys():
            template[key] = str(root / template[key])
    return schema


def stock_features(prepared: Prepared, seed: int = 0) -> dict[str, Any]:
    """Return stock's dense features.

    Args:
        prepared: the input.
        seed: seed of the random rotation of `ref_pos`.
    Returns:
        Stock's collated batch of one, on the CPU.
    """
    return _first(prepared.dataset(), seed)


def compact_features(prepared: Prepared, seed: int = 0) -> dict[str, Any]:
    """Return foldcp's compact features, with the `ref_pos` that `stock_features` has at this seed.

    Args:
        prepared: the input.
        seed: seed of the random rotation of `ref_pos`.
    Returns:
        The collated batch of one, on the CPU.
    """
    from foldcp.boltz.features import boltz2 as features

    dataset = prepared.dataset()
    features.CompactFeaturizer.install(dataset)
    return _first(dataset, seed)


def _first(dataset: PredictionDataset, seed: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    return collate([dataset[0]])


def build_model(
    size: checkpoint.Size = "tiny",
    pairformer_blocks: int = 2,
    msa_blocks: int = 1,
    confidence_blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    steering: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build stock Boltz-2 with untrained weights and the settings `boltz predict` would give it.

    Args:
        size: "tiny" or "real".
        pairformer_blocks: depth of the trunk (`boltz predict`: 64).
        msa_blocks: depth of the MSA module (`boltz predict`: 4).
        confidence_blocks: depth of the confidence module's pairformer (real: 8).
        dtype: float32 or float64.
        seed: seed of the weights, which are the same in both dtypes.
        steering: changes to Boltz's default steering arguments.
    Returns:
        A stock `Boltz2` in eval mode on the CPU.
    """
    arguments = checkpoint.hyperparameters(size)
    arguments["confidence_model_args"]["pairformer_args"]["num_blocks"] = confidence_blocks
    arguments |= dict(
        pairformer_args=asdict(boltz.main.PairformerArgsV2(num_blocks=pairformer_blocks)),
        msa_args=asdict(boltz.main.MSAModuleArgs(msa_blocks=msa_blocks, subsample_msa=True)),
        diffusion_process_args=asdict(boltz.main.Boltz2DiffusionParams()),
        steering_args=asdict(boltz.main.BoltzSteeringParams()) | dict(steering or {}),
        ema=False,
        use_kernels=False,
    )
    return checkpoint.build_model(arguments, "boltz2", seed).to(dtype).requires_grad_(False)


def set_predict_args(
    model: nn.Module,
    recycling: int = 2,
    steps: int = 20,
    samples: int = 2,
    max_parallel_samples: int | None = None,
    extra: Sequence[str] = (),
) -> None:
    """Give a model the arguments its `predict_step` reads.

    Args:
        model: stock or swapped `Boltz2`.
        recycling: recycling steps, so the trunk runs one more time than this.
        steps: sampling steps; below 20 an untrained model's coordinates explode.
        samples: diffusion samples.
        max_parallel_samples: as Boltz's option.
        extra: further outputs of stock's forward to return, for example "pdistogram".
    """
    model.predict_args = dict(
        recycling_steps=recycling,
        sampling_steps=steps,
        diffusion_samples=samples,
        max_parallel_samples=max_parallel_samples,
        write_confidence_summary=True,
        write_full_pae=True,
        write_full_pde=True,
        keys_dict_out=list(extra),
    )


def stock_outputs(
    model: nn.Module, feats: Mapping[str, Any], seed: int = 0, **predict_args: Any
) -> dict[str, Any]:
    """Run `predict_step` of a stock (or swapped) model.

    Args:
        model: float32, or float64: then everything runs in float64, see `everything_float64`.
        feats: a collated batch of one; not changed.
        seed: seed of the sampler.
        **predict_args: see `set_predict_args`.
    Returns:
        What `predict_step` returns: `coords` in angstrom, `plddt`, `pae`, `pde`, `ptm`, `iptm`,
        `pair_chains_iptm`, `s`, `z` and the rest.
    """
    set_predict_args(model, **predict_args)
    double = next(model.parameters()).dtype == torch.float64
    batch = double_features(feats) if double else dict(feats)
    seed_everything(seed, verbose=False)
    with torch.no_grad(), everything_float64() if double else nullcontext():
        return model.predict_step(batch, 0)


def double_features(feats: Mapping[str, Any]) -> dict[str, Any]:
    """Return the features with every floating tensor in float64."""
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in feats.items()
    }


def perturbed(model: nn.Module, eps: float = 1e-7, seed: int = 0) -> nn.Module:
    """Return a copy of a model whose weights are each off by a random relative `eps`.

    Args:
        model: any module.
        eps: standard deviation of the relative change.
        seed: seed of the change.
    Returns:
        The changed copy.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + eps * noise)
    return moved


def largest_differences(ours: Any, theirs: Any, prefix: str = "") -> dict[str, float]:
    """Compare two nested results of `predict_step`.

    Args:
        ours: tensors, numbers and mappings of them.
        theirs: the same structure.
        prefix: name of the place, for the keys of the result.
    Returns:
        The largest absolute difference of every tensor, keyed by its place ("pae",
        "pair_chains_iptm.0.1"); infinity where one side is not finite.
    """
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys(), f"{prefix or 'result'}: {ours.keys() ^ theirs.keys()}"
        pairs = [(f"{prefix}.{key}".lstrip("."), ours[key], theirs[key]) for key in theirs]
        return {k: v for name, a, b in pairs for k, v in largest_differences(a, b, name).items()}
    a, b = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert a.shape == b.shape, f"{prefix}: got {tuple(a.shape)}, expected {tuple(b.shape)}"
    difference = (a - b).abs().nan_to_num(nan=torch.inf)
    return {prefix: float(difference.max()) if difference.numel() else 0.0}


@contextmanager
def everything_float64() -> Iterator[None]:
    """Make float64 stand in for float32, in stock's code and in ours, whatever a cast says.

    `.float()`, `.to(torch.float32)`, `dtype=torch.float32` and the default dtype all give float64.
    Random numbers are still drawn in float32 and then widened: a run consumes the same random
    stream, and sees the same noise, as its float32 twin.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    finally:
        torch.set_default_dtype(default)


_RANDOM = {torch.rand, torch.randn}
_RANDOM_LIKE = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}


class _Float64Mode(TorchFunctionMode):
    """Rewrites the dtype of every torch call made inside it."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        if func in _RANDOM_LIKE:
            device = kwargs.get("device") or args[0].device
            return _RANDOM_LIKE[func](args[0].shape, dtype=torch.float32, device=device).double()
        if func in _RANDOM:
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        args = tuple(_widened(value) for value in args)
        return func(*args, **{key: _widened(value) for key, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
