"""Options, places and environments that no prediction can use end it before anything is loaded."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from foldcp.boltz.command import caches, early, preflight
from foldcp.boltz.command.options import check_numbers
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.runtime import launch
from foldcp.runtime.place import Place

# What Boltz itself predicts with; step 1 of a schedule is 0 / 0.
GOOD = {
    "recycling_steps": 0, "sampling_steps": 2, "sampling_steps_affinity": 2,
    "diffusion_samples": 1, "diffusion_samples_affinity": 1, "max_parallel_samples": None,
    "num_workers": 0, "step_scale": None, "subsample_msa": False, "num_subsampled_msa": 0,
    "preprocessing_threads": 0, "max_msa_seqs": 0, "seed": -1,
}  # fmt: skip
BAD: list[tuple[str, Any]] = [
    ("recycling_steps", -1), ("sampling_steps", 1), ("sampling_steps", 0),
    ("sampling_steps_affinity", 1), ("diffusion_samples", 0), ("diffusion_samples_affinity", 0),
    ("max_parallel_samples", 0), ("num_workers", -1), ("step_scale", 0.0), ("step_scale", -1.5),
    ("step_scale", math.nan), ("step_scale", math.inf),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_numbers_are_checked(name: str, value: Any) -> None:
    check_numbers(GOOD)
    with pytest.raises(UserError, match=rf"^--{name} must be .*, got {value} \("):
        check_numbers({**GOOD, name: value})


def test_all_wrong_numbers_are_told_at_once() -> None:
    wrong = {"diffusion_samples": 0, "num_workers": -1, "subsample_msa": True}
    with pytest.raises(UserError) as told:
        check_numbers({**GOOD, **wrong})
    for name in ("--diffusion_samples", "--num_workers", "--num_subsampled_msa"):
        assert name in str(told.value)


def test_the_schedule_of_one_step_is_no_number() -> None:
    """Why --sampling_steps 1 is refused: Boltz divides 0 by 0."""
    import parity

    sampler = parity.build_model().structure_module
    assert sampler.sample_schedule(1)[0].isnan() and not sampler.sample_schedule(2).isnan().any()


@pytest.mark.parametrize("devices", [0, -1])
def test_no_number_of_devices(devices: int) -> None:
    with pytest.raises(UserError, match=f"--devices {devices} is not a number.*FOLDCP_NPROC=auto"):
        preflight.choose_device({"devices": devices, "accelerator": "cpu"}, Place())


def test_places_are_tried_before_folding(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    good = replace(Config(), resume=str(tmp_path / "new" / "kept"), report=str(tmp_path / "r.json"))
    early.check_resume_and_report(good, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]
    bad = {"report": [tmp_path, tmp_path / "no" / "r.json", file / "r.json"], "resume": [file]}
    for name, paths in bad.items():
        for path in paths:
            config = replace(Config(), **{name: str(path)})
            said = f"FOLDCP_{name.upper()}={path} cannot be written .*: name a "
            with pytest.raises(UserError, match=said):
                early.check_resume_and_report(config, True)
            if name == "report":
                early.check_resume_and_report(config, False)  # only the root rank writes it
    for switch in ("0", "1"):  # in the results folder, or nowhere
        early.check_resume_and_report(replace(Config(), report=switch), True)
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (Path("/dev/null"), tmp_path / "link"):  # a file would take its place
        with pytest.raises(UserError, match=f"FOLDCP_REPORT: {path} is not used: it is a device"):
            early.check_resume_and_report(replace(Config(), report=str(path)), True)


def test_interfaces_of_another_machine() -> None:
    here = socket.if_nameindex()[0][1]
    preflight.check_interfaces({"GLOO_SOCKET_IFNAME": here}, 2)
    preflight.check_interfaces({"GLOO_SOCKET_IFNAME": "mlx7"}, 1)
    with pytest.raises(UserError, match=f"no interface mlx7, only .*{here}"):
        preflight.check_interfaces({"GLOO_SOCKET_IFNAME": f"{here},mlx7"}, 2)


def test_numba_gets_a_folder_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "x"
    for home, package in ((tmp_path / "home", nowhere), (nowhere, tmp_path / "boltz")):
        environ = {"HOME": str(home)}
        caches.choose_numba_folder(environ, package)
        assert "NUMBA_CACHE_DIR" not in environ
    stable = tmp_path / f"foldcp_numba_{os.getuid()}"
    for mode in (0o700, 0o777):  # another user may have put pickles into the second
        environ = {"HOME": str(nowhere)}
        if mode == 0o777:
            stable.chmod(mode)
        caches.choose_numba_folder(environ, nowhere)
        chosen = Path(environ["NUMBA_CACHE_DIR"])
        assert (chosen == stable) == (mode == 0o700) and chosen.stat().st_mode & 0o777 == 0o700
    given = {"HOME": str(nowhere), "NUMBA_CACHE_DIR": "x"}
    caches.choose_numba_folder(given, nowhere)
    assert given["NUMBA_CACHE_DIR"] == "x"


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        (["boltz-community"], "^boltz-community 2.13 is not supported.*`pip uninstall boltz-comm"),
        ([], "^the module boltz, which belongs to no installed package, is not supported"),
    ],
)
def test_another_package_provides_boltz(
    owners: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "boltz":
            raise metadata.PackageNotFoundError(name)
        return "2.13"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"boltz": owners})
    with pytest.raises(ImportError, match=said) as told:
        launch.check_version(ends_process=False)
    assert "pip install 'boltz>=2.2.1,<2.3'" in str(told.value)
