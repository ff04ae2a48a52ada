"""NVIDIA's cuEquivariance: the contract with its real Python, and refusals where it cannot run.

The package's compiled part is replaced, see cueq_python; its Triton kernels run in the
interpreter. `make cueq-python` installs what these tests skip without.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cueq_python import Peer, on_chip
from cueq_python import peer as peer
from kernel_checks import DEVICE, error
from torch import Tensor

from foldcp.boltz.command import preflight
from foldcp.cli.doctor import installed as doctor
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.fabric.mesh import Mesh
from foldcp.rings.triangle_attention import triangle_attention as ring
from foldcp_kernels.core.chunking import set_chunk_bytes
from foldcp_kernels.core.dispatch import set_impl, using
from foldcp_kernels.core.trial import cuequivariance as trial
from foldcp_kernels.triangle_attention import TriangleAttentionWeights, triangle_attention
from foldcp_kernels.triangle_attention import cuequivariance as backend
from foldcp_kernels.triangle_multiplication import (
    TriangleMultiplicationWeights,
    triangle_multiplication,
)

# The package asks nvidia-smi for the GPU when it is imported.
real = pytest.mark.process
on_cpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="the stand-in kernel is for CPUs")
HEADS, WIDTH = 4, 32
HOPPER, BLACKWELL, RTX = (9, 0), (10, 0), (12, 0)
BF16 = 9e-3  # of an update, relative L2


def rand(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) * scale


def parameters(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Gains near 1, matrices that keep the size of what they multiply."""
    return [
        rand(seed + i, *s, scale=s[-1] ** -0.5) if len(s) == 2 else 1 + rand(seed + i, *s) / 4
        for i, s in enumerate(shapes)
    ]


def attention_weights(c: int) -> TriangleAttentionWeights:
    hd = HEADS * WIDTH
    shapes = (c,), (c,), (HEADS, c), (hd, c), (hd, c), (hd, c), (hd, c), (c, hd)
    return TriangleAttentionWeights(*parameters(5, *shapes), HEADS)


def multiplication_weights(c: int) -> TriangleMultiplicationWeights:
    shapes = (c,), (c,), (2 * c, c), (2 * c, c), (c,), (c,), (c, c), (c, c)
    return TriangleMultiplicationWeights(*parameters(3, *shapes))


def in_float32(w: Any) -> Any:
    """The same weights in float32."""
    return type(w)(**{k: x.float() if isinstance(x, Tensor) else x for k, x in vars(w).items()})


def masks(n: int) -> dict[str, Tensor | None]:
    """Masks of pairs: none, padding behind the real tokens, and holes with lines that keep none."""
    token = (torch.arange(n) < n - 3).double()
    g = torch.Generator().manual_seed(n)
    holes = (torch.rand(1, n, n, generator=g) > 0.3).double()
    holes[0, n // 2], holes[0, :, n // 3] = 0, 0
    return {"none": None, "padding": (token[:, None] * token)[None], "holes": holes}


def relative(got: Tensor, want: Tensor) -> float:
    """The relative error in L2."""
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(autouse=True)
def _warnings_and_gradients() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        yield
    set_chunk_bytes(None)


def on_tiles(z: Tensor, mask: Tensor | None, w: Any, starting: bool) -> Tensor:
    """Triangle attention of one rank, in chunks of lines, with padding behind the tokens."""
    n, padded = z.shape[1], -(-z.shape[1] // 16) * 16
    mesh = Mesh.create(1, 1, torch.device("cpu"))
    mesh.multiple = 16
    tile = torch.full((1, padded, padded, z.shape[-1]), 3.0, dtype=z.dtype)
    tile[:, :n, :n] = z
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, padded - n, 0, padded - n))
    set_chunk_bytes(2_000_000)
    with using("cuequivariance"):
        return ring(tile, mask, w, starting, mesh.layout(n), mesh)[:, :n, :n]


@real
@on_cpu
@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL, RTX], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("mask", ["none", "padding", "holes"])
@pytest.mark.parametrize(("n", "c"), [(43, 64), (109, 128)])  # 100: torch, or the kernels
def test_attention_is_that_of_the_definition(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int], mask: str, n: int, c: int
) -> None:
    on_chip(peer, chip, monkeypatch)
    w, keep = attention_weights(c), masks(n)[mask]
    z = rand(1, 1, n, n, c).float()
    full = torch.ones(1, n, n).double() if keep is None else keep
    low = chip != HOPPER and (mask, chip) != ("holes", BLACKWELL)
    for starting in (True, False):
        want = triangle_attention(z.double(), full, w, starting, "reference") - z.double()
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*(cast to|multiple of 8|off the SM100f)")
            whole = triangle_attention(z.clone(), keep, in_float32(w), starting, "cuequivariance")
            cut = on_tiles(z.clone(), keep, in_float32(w), starting)
        assert relative(whole - z, want) < BF16 and relative(cut - z, want) < BF16
    if n < 100:
        assert not peer.launches
        return
    one, *chunks = peer.launches[: len(peer.launches) // 2]
    assert len(chunks) > 2 and len({x.bias.data_ptr() for x in chunks}) == 1, "copied for a chunk"
    for launch in peer.launches:
        assert launch.low_bias == low and launch.keys == (112 if low else 109)
        assert (launch.mask is None) == (mask == "none" or (chip == BLACKWELL and low))
        assert (launch.lengths is None) == (not low or (mask != "none" and chip == RTX))


@real
@on_cpu
@pytest.mark.parametrize("chip", [(8, 0), HOPPER, BLACKWELL, (10, 3), (11, 0), RTX, (12, 1)])
def test_the_bias_is_what_the_package_chooses_its_kernel_by(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int]
) -> None:
    on_chip(peer, chip, monkeypatch)
    n = 104
    for name, keep in masks(n).items():
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(1, n, HEADS, n, WIDTH, dtype=dtype)
            bias = torch.zeros(1, HEADS, n, n, dtype=dtype)
            bias, kept = backend.prepare(bias, None if keep is None else keep.bool(), dtype)
            mask, lengths = kept, None
            if kept is not None and kept.dtype == torch.int32:
                mask, lengths = None, kept
            if mask is not None:
                mask = mask[:, :, None, None]
            kind, _ = peer.attention._select_forward_backend(q, q, mask, lengths)
            generic = kind == peer.attention.FwdBackend.GENERIC
            assert bias.dtype == (torch.float32 if generic else dtype), (chip, name, dtype)


@real
@on_cpu
@pytest.mark.parametrize("c", [64, 128])
@pytest.mark.parametrize("outgoing", [True, False])
def test_multiplication_is_that_of_the_definition(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, outgoing: bool, c: int
) -> None:
    w = multiplication_weights(c)
    # In torch; by its Triton kernels, which would begin at 101 tokens; and, once, at 101.
    for n, kernels in ((40, False), (33, True), *([(101, True)] if outgoing and c == 64 else [])):
        if kernels and n < 100:
            monkeypatch.setattr(peer.multiplication, "CUEQ_TRIMUL_FALLBACK_THRESHOLD", 0)
        calls = []
        made = peer.multiplication.fused_sigmoid_gated_dual_gemm
        with monkeypatch.context() as patch:
            patch.setattr(
                peer.multiplication,
                "fused_sigmoid_gated_dual_gemm",
                lambda *a, made=made, calls=calls, **k: calls.append(1) or made(*a, **k),
            )
            for name in ("holes",) if n > 100 else ("none", "padding", "holes"):
                z, keep = rand(1, 1, n, n, c), masks(n)[name]
                full = torch.ones(1, n, n).double() if keep is None else keep
                want = triangle_multiplication(z, full, w, outgoing, "reference") - z
                call = z.float(), keep, in_float32(w), outgoing
                got = triangle_multiplication(*call, "cuequivariance").double() - z.float()
                assert relative(got, want) < 3e-6
        assert bool(calls) == kernels
        monkeypatch.setattr(peer.multiplication, "CUEQ_TRIMUL_FALLBACK_THRESHOLD", 100)


@real
@on_cpu
@pytest.mark.parametrize("mean", [0, 20, 100])
def test_multiplication_rounds_behind_the_norm(peer: Peer, mean: float) -> None:
    """Rounding z before it cost 0.57, 1.8 and 6.6 % where the channels' mean is so many spreads."""
    n, c = 48, 128
    w, z = multiplication_weights(c), (rand(1, 1, n, n, c) + mean).float()
    for outgoing in (True, False):
        truth = z.double(), torch.ones(1, n, n).double(), w, outgoing, "reference"
        want = triangle_multiplication(*truth) - z.double()
        with torch.autocast("cpu", torch.bfloat16):
            call = z.clone(), None, in_float32(w), outgoing
            got = triangle_multiplication(*call, "cuequivariance").double() - z.double()
        assert relative(got, want) < 0.5e-2  # 0.48 % measured


@real
@on_cpu
def test_gradients_are_those_of_the_definition(peer: Peer) -> None:
    n, c = 12, 64
    keep = (masks(n)["holes"].bool() | torch.eye(n).bool()).double()
    cases: list[tuple[Any, Any]] = [
        (triangle_attention, attention_weights(c)),
        (triangle_multiplication, multiplication_weights(c)),
    ]
    for op, w in cases:
        found = []
        for impl in ("cuequivariance", "reference"):
            with torch.enable_grad():
                z = rand(1, 1, n, n, c).requires_grad_()
                op(z, keep, w, False, impl).square().sum().backward()
            found.append(z.grad)
        assert error(*found) < 1e-12


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What is installed: nothing, until a test says more."""
    trial.fault.cache_clear()

    def there(**found: Any) -> None:
        trial.fault.cache_clear()
        for name in ("cuequivariance_torch", "cuequivariance_ops_torch"):
            one = found.get(name.removeprefix("cuequivariance_"))
            if one is not None:
                one = SimpleNamespace(__name__=name, **one)
            monkeypatch.setitem(sys.modules, name, one)

    there()
    yield there
    trial.fault.cache_clear()


def test_a_package_that_cannot_run_is_refused_at_the_start(
    packages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = {"__version__": "0.13.0"}, {"__version__": "0.9.1"}
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    line = "pip install 'cuequivariance-torch>=0.13' 'cuequivariance-ops-torch-cu12>=0.13'"
    cases = (
        ({}, "cuequivariance_torch and cuequivariance_ops_torch not installed"),
        ({"torch": new}, "cuequivariance_ops_torch not installed"),
        ({"torch": old, "ops_torch": new}, "cuequivariance_torch is 0.9.1; expected 0.13 or newer"),
        ({"torch": new, "ops_torch": {}}, "is of unknown version; expected 0.13 or newer"),
        (
            {"torch": new, "ops_torch": new | {"IMPORT_EXCEPTION": "Traceback\nNo triton"}},
            "the Triton kernels of cuequivariance_ops_torch do not import (No triton)",
        ),
    )
    for there, why in cases:
        packages(**there)
        with pytest.raises(ValueError) as refused:
            set_impl("cuequivariance")
        assert f"{why}: {line}; or use auto" in str(refused.value)
        with pytest.raises(UserError, match="FOLDCP_KERNELS=cuequivariance: .*pip install"):
            preflight.choose_kernels({}, Config(kernels="cuequivariance"))
        z, w = rand(1, 1, 4, 4, 8), multiplication_weights(8)
        with pytest.raises(ValueError, match="impl='cuequivariance' cannot run: .*pip install"):
            triangle_multiplication(z, None, w, True, "cuequivariance")
        monkeypatch.setattr(doctor, "version", lambda name: "0.9" if "cueq" in name else "")
        (note,) = (x for x in doctor.packages(1) if x.name == "cuEquivariance")
        assert note.remedy == trial.fault() and note.remedy.endswith(line) and not note.fatal
    packages(torch=new, ops_torch=new)
    assert trial.fault() is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert trial.pip_line().endswith("'cuequivariance-ops-torch-cu13>=0.13'")


def test_a_package_that_does_not_import_is_refused(
    packages: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    packages(torch={"__version__": "0.13.0"})
    monkeypatch.delitem(sys.modules, "cuequivariance_ops_torch")
    (tmp_path / "cuequivariance_ops_torch.py").write_text(
        "raise ImportError('libcublas.so.13: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert str(trial.fault()).startswith(
        "cuequivariance_ops_torch does not import (libcublas.so.13 cannot open shared object "
        "file): pip install"
    )
