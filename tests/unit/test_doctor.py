"""What `foldcp doctor` makes of GPU machines, of what they lack, and of what was asked for.

There is no GPU here: the tables have the form of nvidia-smi's, and were written by hand.
"""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from typing import Any

import pytest

from foldcp.cli.doctor import command, gpus, installed, limits
from foldcp.cli.doctor.asked import Machine, impossible
from foldcp.cli.doctor.finding import Finding
from foldcp.config import Config

# Four GPUs of which two each are joined by NVLink, in two sockets, with a network card.
PAIRED = """\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV4\tSYS\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV4\t X \tSYS\tSYS\tNODE\t0-31\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tNV4\tSYS\t32-63\t1\t\tN/A
GPU3\tSYS\tSYS\tNV4\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\tSYS\t X

Legend:
  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""
SWITCHED = "\tGPU0\tGPU1\tGPU2\nGPU0\t X \tNV18\tNV18\nGPU1\tNV18\t X \tNV18\nGPU2\tNV18\tNV18\t X"
SOUND = Machine(4, None, None, None, None, True, True, False, True)
BARE = replace(SOUND, gpus=0, triton="the input is on cpu; expected a GPU")


def test_links_are_read_from_the_table() -> None:
    found = gpus.links((True, PAIRED), 4)
    assert found.text == "PCIe (SYS) between 4 pairs (0-2, 0-3, 1-2, 1-3); NVLink (4 links) between 2 pairs (0-1, 2-3)"  # fmt: skip # noqa: E501
    assert found.remedy.startswith("FOLDCP_ROUTE=ring")
    assert gpus.links((True, SWITCHED), 3) == Finding(
        "links", "NVLink (18 links) between all pairs"
    )
    for answer in ((False, "no permission"), (True, ""), (True, SWITCHED.replace("GPU1\t", "X\t"))):
        assert gpus.links(answer, 3).text.startswith("not known")


def test_peers_are_asked_both_ways() -> None:
    assert gpus.peers(3, lambda a, b: True) == Finding("peer access", "between all pairs")
    found = gpus.peers(3, lambda a, b: (a, b) != (2, 0))
    assert found.text == "not between 0-2" and "IOMMU" in found.remedy


def test_a_gpu_that_torch_does_not_see_is_explained() -> None:
    two = (True, "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)")
    assert "built for CPUs" in gpus.unseen(two, None, {}).remedy
    hidden = gpus.unseen(two, "12.8", {"CUDA_VISIBLE_DEVICES": ""})
    assert hidden.text.endswith("lists 2") and "CUDA_VISIBLE_DEVICES is ''" in hidden.remedy
    assert "CUDA 12.8: update the driver" in gpus.unseen(two, "12.8", {}).remedy
    broken = gpus.unseen((False, "NVIDIA-SMI has failed because\nit could"), "12.8", {})
    assert "has failed because it could" in broken.text and "repair the driver" in broken.remedy
    for none in ((False, gpus._NOT_ON_PATH), (True, "No devices found")):
        plain = gpus.unseen(none, "12.8", {})
        assert plain == Finding("GPU", "none visible: pass --accelerator cpu to boltz predict")


def test_gpus_and_drivers_that_are_too_old() -> None:
    assert gpus.described(1, "H200", 150 * 10**9, (9, 0)) == Finding("GPU 1", "H200, 150 GB, sm_90")
    assert "run in torch" in gpus.described(0, "V100", 16 * 10**9, (7, 0)).remedy
    answer = True, "550.54.15\n550.54.15"
    assert gpus.driver(answer, 12040, "12.8") == Finding("driver", "550.54.15, runs CUDA 12.4")
    assert "for CUDA 13.0: update the driver" in gpus.driver(answer, 12040, "13.0").remedy
    assert gpus.driver((False, "x"), 0, "13.0") == Finding("driver", "of unknown version")


@pytest.mark.process
def test_nvidia_smi_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus.ask("-L") == (False, gpus._NOT_ON_PATH)


def test_limits() -> None:
    assert "--shm-size=1g" in limits.shared_memory(2, 64 << 20).remedy
    assert "mount a tmpfs" in limits.shared_memory(2, None).remedy
    for count, size in ((2, 1 << 30), (1, 64 << 20), (0, None)):
        assert not limits.shared_memory(count, size).remedy
    assert limits.shared_memory_size("/nowhere") is None and limits.shared_memory_size("/")
    assert limits.open_files(256) == Finding("open files", "256", "run `ulimit -n 4096` before")
    assert limits.open_files(1024) == Finding("open files", "1,024")
    unlimited = resource.RLIM_INFINITY
    assert (
        limits.open_files(unlimited).text == limits.locked_memory(8, unlimited).text == "unlimited"
    )
    assert "memlock=-1" in limits.locked_memory(2, 8 << 20).remedy
    assert limits.locked_memory(1, 8 << 20) == Finding("lock memory", "8 MiB")


@pytest.mark.parametrize(
    ("variables", "lacks", "remedy"),
    [
        ({"KERNELS": "triton"}, {"triton": "no C compiler: install gcc"}, "install gcc"),
        ({"KERNELS": "triton"}, {"gpus": 0}, "use auto"),
        ({"KERNELS": "cuequivariance"}, {"cuequivariance": "it is not there: pip"}, "pip"),
        ({"TRANSPORT": "nccl"}, {"gpus": 0}, "use auto"),
        ({"TRANSPORT": "nccl"}, {"nccl": "no libnccl: set FOLDCP_NCCL_LIB"}, "set FOLDCP_NCCL_LIB"),
        ({"TRANSPORT": "host"}, {"extension": "it was not built: run pip"}, "run pip"),
        ({"TRANSPORT": "copy-engine"}, {"extension": "it was not built: run pip"}, "run pip"),
        ({"TRANSPORT": "torch-nccl"}, {"torch_nccl": False}, "install a build of torch for CUDA"),
        ({"TRANSPORT": "gloo"}, {"gloo": False}, "use auto"),
        ({"NCCL_LIB": "x.so"}, {"nccl": "x.so does not open: name another"}, "name another"),
        ({"GRAPHS": "1"}, {"gpus": 0}, "use auto"),
        ({"NPROC": "4"}, {"gpus": 3}, "start at most 3, or pass --accelerator cpu"),
        ({"NPROC": "3", "DP": "2"}, {}, "start 2 ranks, or set FOLDCP_DP to a divisor of 3"),
        ({"FOLDCP": "1"}, {"hooked": False}, "install foldcp with pip, or use `foldcp predict`"),
    ],
)
def test_what_is_asked_for_and_cannot_run(
    variables: dict[str, str], lacks: dict[str, Any], remedy: str
) -> None:
    config = Config.from_env(
        {x if x == "FOLDCP" else f"FOLDCP_{x}": variables[x] for x in variables}
    )
    machine = replace(SOUND, **lacks)
    (found,) = impossible(config, machine)
    assert found.fatal and found.remedy == remedy and found.name.startswith("FOLDCP")
    assert not list(impossible(Config(), machine)), "nobody asked for it"
    if lacks:
        assert not list(impossible(config, SOUND))


def test_a_machine_without_gpus_is_healthy() -> None:
    asked = Config.from_env({"FOLDCP_TRANSPORT": "host", "FOLDCP_NPROC": "8", "FOLDCP_MESH": "2x4"})
    assert not list(impossible(asked, BARE))
    stand_in = Config.from_env({"FOLDCP_TRANSPORT": "nccl", "FOLDCP_NCCL_LIB": "fake.so"})
    assert not list(impossible(stand_in, BARE))
    shared = Config.from_env({"FOLDCP_NPROC": "8"})
    assert not list(impossible(shared, replace(SOUND, shared_gpus=True)))


@pytest.mark.process
def test_the_exit_code_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boltz = Finding("boltz", "2.2.1")
    monkeypatch.setattr(installed, "boltz", lambda: boltz)
    monkeypatch.setenv("FOLDCP_KERNELS", "triton")
    assert command.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (fatal,) = (one for one in told["findings"] if one["fatal"])
    assert told["healthy"] is False and fatal["name"] == "FOLDCP_KERNELS=triton"
    monkeypatch.setenv("FOLDCP_KERNELS", "cuda")
    assert command.main([]) == 1
    said = capsys.readouterr().out
    assert "variables " in said and "FOLDCP_KERNELS must be auto or torch" in said
    monkeypatch.delenv("FOLDCP_KERNELS")
    assert command.main(["--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = {one["name"] for one in told["findings"]}
    assert told["healthy"] and {"GPU", "triton", "cuEquivariance", "TransformerEngine"} <= names
    assert {"/dev/shm", "open files", "lock memory", "extension", "transport", "boltz"} <= names
