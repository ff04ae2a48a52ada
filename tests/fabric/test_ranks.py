"""The ranks that tests share: they live on, start each call anew, are replaced on failure."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
import ranks
import torch
from ranks import run

from foldcp.fabric.mesh import Mesh
from foldcp_kernels.core.chunking import chunk_bytes, set_chunk_bytes
from foldcp_kernels.core.dispatch import default_impl, set_impl


def spoiled(mesh: Mesh) -> tuple[int, tuple]:
    """(process, what a call finds), and leave all of it otherwise."""
    found = (
        (torch.rand(1).item(), np.random.rand(), random.random(), torch.get_default_dtype()),
        (torch.is_grad_enabled(), chunk_bytes(mesh.device), default_impl()),
        (torch.empty(4).isnan().all().item(), torch.get_num_threads()),
        (
            os.getcwd(),
            os.environ.get("LEFT"),
            mesh.transport,
            mesh.ranks.all_gather_object(mesh.rank),
        ),
    )
    os.environ["LEFT"] = "by a call"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.utils.deterministic.fill_uninitialized_memory = False
    set_chunk_bytes(1)
    set_impl("torch")
    return os.getpid(), found


def failing(mesh: Mesh, how: str) -> None:
    """Fail on rank 1 while rank 0 waits for it."""
    if mesh.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        pytest.fail("on purpose")
    mesh.ranks.barrier()


def test_a_call_finds_the_state_of_a_new_process() -> None:
    first, second = run(1, 2, spoiled), run(1, 2, spoiled)
    assert first == second, "other processes, or something was left"
    new = run(1, 2, spoiled, fresh=True)
    assert [found for _, found in new] == [found for _, found in first]
    assert not {pid for pid, _ in new} & {pid for pid, _ in first}
    random_numbers, settings, memory, (folder, left, transport, all_ranks) = first[1][1]
    assert random_numbers[3] is torch.float32 and settings[0] and settings[2] == "auto"
    assert memory == (True, 1) and folder == os.getcwd() and left is None
    assert (transport, all_ranks) == ("host", [0, 1])
    assert run(2, 1, spoiled, transport="gloo")[0][1][3][2] == "gloo"


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_ranks_that_fail_are_replaced(how: str) -> None:
    before = {pid for pid, _ in run(1, 2, spoiled)}
    start = time.monotonic()
    said = {"raises": "Failed: on purpose", "killed": "it ended with code -9"}[how]
    with pytest.raises(AssertionError, match=f"^rank 1 of 1x2 failed:\n(.|\n)*{said}"):
        run(1, 2, failing, how)
    assert time.monotonic() - start < 30
    assert not before & {pid for pid, _ in run(1, 2, spoiled)}


def test_ranks_that_end_between_calls_are_replaced() -> None:
    pid = run(1, 2, spoiled)[1][0]
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while not ranks._pools[2].ended():
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.warns(UserWarning, match="after test_ranks.spoiled on 1x2: rank 1 ended with code"):
        assert run(1, 2, spoiled)[1][0] != pid
