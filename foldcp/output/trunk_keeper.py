"""FOLDCP_RESUME: each rank's result of the trunk is kept until the prediction is on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.modules.hooks import Like
from foldcp.modules.settings import Features, Settings
from foldcp.output import trunk_file
from foldcp.runtime.files.names import LONGEST, Unsafe, check, inside, regular


class TrunkKeeper:
    """Makes, per input, what keeps its trunk.

    Args:
        folder: FOLDCP_RESUME.
        parts: whatever a trunk's result follows from besides the features (weights, seed,
            precision, versions).
        mesh: the mesh; each rank keeps its own tile.
    """

    def __init__(self, folder: Path, parts: dict[str, Any], mesh: Mesh) -> None:
        self._folder, self._parts, self._mesh = folder, parts, mesh

    def begin(self, feats: Features, settings: Settings) -> KeptTrunk:
        """Begin an input; returns the keeper of its trunk.

        Args:
            feats: compact features.
            settings: of the prediction.
        """
        # The random rotations of the conformers are kept with the trunk: without a seed they
        # differ from run to run.
        seen = {k: v for k, v in feats.items() if isinstance(v, Tensor) and k != "ref_pos"}
        parts = {**self._parts, "recycling": settings.recycling_steps}
        parts["mesh"] = f"{self._mesh.rows}x{self._mesh.cols}"
        found = getattr((feats.get("record") or [None])[0], "id", "input")
        name = check(found, "the record's name", LONGEST)
        place = f"{name}_{trunk_file.key(parts, seen)}"
        rank = f"rank{self._mesh.rank}of{self._mesh.size}.trunk"
        return KeptTrunk(self._folder / place / rank, feats, self._mesh)


class KeptTrunk:
    """The trunk of one input on one rank.

    Args:
        path: of this rank's file.
        feats: of the input; `ref_pos` is replaced on loading.
        mesh: the mesh.
    """

    def __init__(self, path: Path, feats: Features, mesh: Mesh) -> None:
        self._path, self._feats, self._mesh = path, feats, mesh
        self._usable = True  # what is there was written by foldcp

    def load(self, like: Like) -> tuple[Tensor, Tensor] | None:
        """Load the single shard and the pair tile, if every rank has its file; all ranks call it.

        The generators of random numbers continue where they were when the trunk was kept.

        Args:
            like: shape of `s` and of `z`, and the dtypes that they may have.
        """
        device = self._mesh.device
        try:
            found = self._read(like)
        except (trunk_file.Damaged, OSError) as error:
            found = None
            _say(f"{error}: it is not used, and the trunk is computed again")
        if not all(self._mesh.ranks.all_gather_object(found is not None)):
            return None
        assert found is not None
        self._feats["ref_pos"] = found["ref_pos"]
        torch.set_rng_state(found["cpu_state"])
        if "cuda_state" in found:
            torch.cuda.set_rng_state(found["cuda_state"], device)
        if self._mesh.is_root:
            print(f"foldcp: the trunk is taken from {self._path.parent}", flush=True)
        return found["s"], found["z"]

    def _read(self, like: Like) -> dict[str, Tensor] | None:
        device = self._mesh.device
        try:
            for path in (self._path.parent, self._path):
                inside(path)
            regular(self._path)
        except Unsafe as error:
            self._usable = False
            raise trunk_file.Damaged(f"{error} (remove it to have this trunk kept)") from error
        found = trunk_file.load(self._path, device)
        # A GPU's generator has no place in a file of a CPU run, and the other way round.
        if found is None or ("cuda_state" in found) != (device.type == "cuda"):
            return None
        ref_pos = self._feats["ref_pos"]
        expected = {**like, "ref_pos": (tuple(ref_pos.shape), (ref_pos.dtype,))}
        generators = {"cpu_state": torch.device("cpu"), "cuda_state": device}
        for name in generators.keys() & ({"cpu_state"} | found.keys()):
            state = torch.Generator(generators[name]).get_state()
            expected[name] = tuple(state.shape), (state.dtype,)
        _check(self._path, found, expected)
        for name in generators.keys() & found.keys():
            _check_generator(self._path, name, found[name], generators[name])
        return found

    def save(self, s: Tensor, z: Tensor) -> None:
        """Keep a trunk; a full disk costs only the possibility to resume.

        Args:
            s: single shard [1, n, C_s].
            z: pair tile [1, T_r, T_c, C].
        """
        if not self._usable:
            return
        tensors = {"s": s, "z": z, "ref_pos": self._feats["ref_pos"]}
        tensors["cpu_state"] = torch.get_rng_state()
        if self._mesh.device.type == "cuda":
            tensors["cuda_state"] = torch.cuda.get_rng_state(self._mesh.device)
        try:
            trunk_file.save(self._path, tensors)
        except OSError as error:
            _say(f"the trunk could not be kept in {self._path} ({error.strerror or error})")

    def drop(self) -> None:
        """Remove this rank's file, and the folder after the last one."""
        if not self._usable:
            return
        self._path.unlink(missing_ok=True)
        try:
            self._path.parent.rmdir()
        except OSError:
            return  # other ranks' files are still there, or it is gone


def _check(path: Path, found: Mapping[str, Tensor], expected: Like) -> None:
    """Compare the fields of a file with what this run would have written.

    Args:
        path: of the file.
        found: its tensors.
        expected: their shapes and possible dtypes.

    Raises:
        Damaged: names the first field that differs.
    """
    for name in (*expected, *found):
        if name not in found or name not in expected:
            word = "is missing" if name not in found else "is not part of a trunk"
            raise trunk_file.Damaged(f"{path} is not a whole trunk ({name!r} {word})")
        (shape, dtypes), x = expected[name], found[name]
        if tuple(x.shape) != shape:
            got = list(x.shape)
            raise trunk_file.Damaged(f"{path}: {name} has shape {got}, expected {list(shape)}")
        if x.dtype not in dtypes:
            raise trunk_file.Damaged(f"{path}: {name} is {x.dtype}, expected {dtypes[0]}")
        if x.is_floating_point() and not torch.isfinite(x.sum(dtype=torch.float64)):
            raise trunk_file.Damaged(f"{path}: {name} has NaN or infinite values")


def _check_generator(path: Path, name: str, state: Tensor, device: torch.device | str) -> None:
    trial, wrong = torch.Generator(device), f"{name} is not the state of a generator"
    try:
        trial.set_state(state)
        drawn = torch.rand(8, generator=trial, device=trial.device)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise trunk_file.Damaged(f"{path}: {wrong} ({why})") from error
    if (drawn == drawn[0]).all():
        raise trunk_file.Damaged(f"{path}: {wrong} (it repeats itself)")


def _say(message: str) -> None:
    print(f"foldcp: FOLDCP_RESUME: {message}", file=sys.stderr, flush=True)
