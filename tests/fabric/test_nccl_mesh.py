"""The nccl transport of a mesh over the stand-in for NCCL: what it brings, who hears of errors."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native import SOURCES, compile_shared
from nccl_engine import LIBRARY
from ranks import run

from foldcp.errors import TransportError
from foldcp.fabric.connect import Options
from foldcp.fabric.exchange.autograd import stream
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.transport.torch_transport import TorchTransport
from foldcp.layout.tiles import PairLayout
from foldcp.layout.triangle_plans import triangle_multiplication_plan


def _regions(mesh: Mesh) -> list[torch.Tensor]:
    layout = PairLayout(30, mesh.rows, mesh.cols, mesh.rank)
    made = triangle_multiplication_plan(layout, 4, True, 2, "ring")
    g = torch.Generator().manual_seed(mesh.rank)
    shape = (1, 4, layout.tile_rows, layout.tile_cols)
    sources = [torch.randn(shape, generator=g) for _ in range(2)]
    steps = stream(mesh, made, sources, ((1, 2, 3),) * 2, "panels", ("fp8", "raw"))
    return [x.clone() for step in steps for x in step]


def on_the_stand_in(mesh: Mesh, library: str) -> dict[str, Any]:
    """Exchange, close, connect again with an error to come on rank 1, and wait for it."""
    os.environ["MOCK_NCCL_DIR"] = str(Path(library).parent)
    os.environ["MOCK_NCCL_POLLS"] = "3"
    options = Options(deadline=60.0, nccl_library=library)
    nccl = mesh.connected("nccl", options)
    want = _regions(replace(mesh, link=TorchTransport(mesh.ranks)))
    same = all(torch.equal(a, b) for a, b in zip(_regions(nccl), want, strict=True))
    name = nccl.transport
    nccl.close()
    if mesh.rank == 1:
        os.environ["MOCK_NCCL_ERROR_AT"] = "8"
    nccl = mesh.connected("nccl", options)
    start = time.monotonic()
    said = "nothing"
    try:
        while time.monotonic() - start < 30:
            _regions(nccl)
    except TransportError as error:
        said = str(error)
    seconds = time.monotonic() - start
    try:
        _regions(nccl)
        again = "nothing"
    except TransportError as error:
        again = str(error)
    mesh.ranks.barrier()  # the control messages still work
    return {"same": same, "name": name, "said": said, "again": again, "seconds": seconds}


def test_nccl_of_a_mesh(tmp_path: Path) -> None:
    library = compile_shared(SOURCES / "mock_nccl.cpp", tmp_path / LIBRARY)
    found = run(2, 2, on_the_stand_in, str(library), transport="gloo", fresh=True)
    for rank, result in enumerate(found):
        assert result["same"] and result["name"] == "nccl"
        assert result["seconds"] < 5, found
        assert result["again"] == result["said"]
        assert result["said"].startswith("exchange of tiles (nccl): ")
        # The rank itself, and every other one: through the store, which names it, or because its
        # own communicator broke.
        assert "NCCL: " in result["said"], (rank, result)
    assert any("rank 1: NCCL: " in r["said"] for i, r in enumerate(found) if i != 1), found


def test_nccl_that_is_not_there() -> None:
    with pytest.raises(AssertionError, match="transport nccl cannot run here, rank 0: NCCL cannot"):
        run(1, 2, missing, transport="gloo", fresh=True)


def missing(mesh: Mesh) -> None:
    """A library that does not exist."""
    mesh.connected("nccl", Options(nccl_library="/nowhere/libnccl.so"))


def corrupting(mesh: Mesh, library: str) -> str:
    """Connect over a link that changes what lies beyond 256 KiB of a message to rank 1."""
    os.environ["MOCK_NCCL_DIR"] = str(Path(library).parent)
    if mesh.rank == 1:
        os.environ["MOCK_NCCL_CORRUPT"] = str(256 << 10)
    try:
        mesh.connected("nccl", Options(deadline=60.0, nccl_library=library))
    except TransportError as error:
        return str(error)
    return "connected"


def test_a_link_that_corrupts_long_messages(tmp_path: Path) -> None:
    library = compile_shared(SOURCES / "mock_nccl.cpp", tmp_path / LIBRARY)
    for said in run(1, 2, corrupting, str(library), transport="gloo", fresh=True):
        assert "rank 1: a trial exchange with rank 0 brought wrong numbers" in said
        assert "IOMMU or ACS" in said and "NCCL_P2P_DISABLE=1" in said


def gpus(mesh: Mesh, count: int) -> dict[str, Any]:
    """The GPUs that ranks get where so many are visible, and what NCCL of two releases says."""
    from foldcp.fabric.connect import _same_gpu

    current: list[torch.device] = []
    torch.cuda.device_count = lambda: count
    torch.cuda.set_device = current.append
    torch.cuda.get_device_properties = lambda d: SimpleNamespace(uuid=f"uuid {d.index}")
    os.environ["LOCAL_RANK"] = str(mesh.rank)
    made = Mesh.create(mesh.rows, mesh.cols, "cuda", transport=None)
    assert current == [made.device]
    os.environ.pop("NCCL_MULTI_RANK_GPU_ENABLE", None)
    said = [_same_gpu(made.ranks, 22907), _same_gpu(made.ranks, 23000)]
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    return {"gpu": made.device.index, "said": said, "shared": _same_gpu(made.ranks, 23000)}


@pytest.mark.parametrize("count", [1, 2])
def test_every_rank_takes_the_gpu_of_its_local_rank(count: int) -> None:
    found = run(1, 2, gpus, count, transport="gloo", fresh=True)
    assert [x["gpu"] for x in found] == ([0, 0] if count == 1 else [0, 1])
    for x in found:
        assert x["shared"] is None
        for said in x["said"]:
            assert (said is None) == (count == 2)
            assert said is None or "ranks 0 and 1 both use one GPU (uuid 0)" in said
