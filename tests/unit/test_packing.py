"""Pieces on the wire, raw and FP8, against torch; the CUDA kernels only where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native import SEGMENT, decode, encode, operators, scale_bytes, wire_bytes
from torch import Tensor

from foldcp.fabric.transport import wire

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
RAW = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
RAW += [torch.complex64, torch.complex128, torch.float8_e4m3fn]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "inner": lambda x: x[1:, 2:-1, 3:10],
    "lines": lambda x: x[:, 3, :8],
    "stepped": lambda x: x[:, ::2, 1::3],
    "one line": lambda x: x[0, :, 0],
    "one": lambda x: x[1, 2, 3],
    "nothing": lambda x: x[:, :0],
    "spread": lambda x: x[:, :1, :1].expand(-1, 5, 9),
    "eight": lambda x: x.unflatten(2, (2, 2, 3)).permute(2, 0, 4, 1, 3)[None, :, :, None].mT,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EDGES = [0.0, -0.0, 448.0, 464.0, 449.0, 224.0, 225.0, 231.9, 232.0, 1.0, 17.0, 2.0**-6, 2.0**-9]
EDGES += [2.0**-10, 1.5 * 2.0**-10, 2.0**-10 + 2.0**-20, 240.0, 248.0, 0.0146, 65504.0, 63488.0]
EDGES += [6e-8, 2.0**-14, 2.0**-24, 3e-6, 1e-38, 1e-40, 1.4e-45, 3e-43, 3.2e-43, 1e38, 3.38e38]
EDGES += [3.4028234e38, 2.0**127, 448 * 2.0**-126, 449 * 2.0**-126, 447 * 2.0**-126, 1e-300]


def _pack(view: Tensor, fp8: bool) -> Tensor:
    """The message, after a look that nothing was written behind it or between its parts."""
    size = wire_bytes(view, fp8)
    message = torch.full((size + 64,), 0xA5, dtype=torch.uint8, device=view.device)
    operators().pack_piece(view, fp8, message)
    assert (message[size:] == 0xA5).all()
    message = message[:size].cpu()
    if fp8:
        gap = slice(4 * -(-view.numel() // SEGMENT), scale_bytes(view.numel()))
        assert (message[gap] == 0xA5).all()
        message[gap] = 0
    return message


def _unpack(message: Tensor, fp8: bool, view: Tensor) -> None:
    operators().unpack_piece(message.to(view.device), fp8, view)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _wide(dtype: torch.dtype, device: str) -> Tensor:
    """A source of [4, 7, 12] inside a larger tensor."""
    random = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (4, 9, 12 * dtype.itemsize), dtype=torch.uint8, generator=random)
    x = x & 1 if dtype == torch.bool else x
    return x.view(dtype)[:, 1:-1].to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_raw_pieces(dtype: torch.dtype, view: str, device: str) -> None:
    x = VIEWS[view](_wide(dtype, device))
    message = _pack(x, False)
    assert torch.equal(message, _bits(x).cpu())
    if view == "spread":
        return  # one element cannot hold several
    base = _wide(dtype, device).clone()
    target, whole = VIEWS[view](base), torch.zeros_like(base, dtype=torch.bool)
    VIEWS[view](whole).fill_(True)
    target.copy_(torch.zeros_like(target))
    before = base.clone()
    _unpack(message, False, target)
    assert torch.equal(_bits(target), _bits(x))
    assert torch.equal(_bits(base[~whole]), _bits(before[~whole]))


def _numbers(dtype: torch.dtype, count: int) -> Tensor:
    """Numbers of many magnitudes, alike within a segment, with the edges strewn among them."""
    random = torch.Generator().manual_seed(count)
    x = torch.randn(count, dtype=torch.float64, generator=random)
    segments = torch.arange(count) // SEGMENT
    spread = torch.randint(-20, 16, (count,), generator=random)
    x = x * torch.exp2(torch.where(segments % 3 == 0, 0, spread)) * torch.exp2(-7.0 * segments)
    some = torch.randperm(count, generator=random)[: count // 6]
    # Larger ones would leave nothing of their neighbours.
    values = torch.tensor([v for v in EDGES if v < 500], dtype=torch.float64).repeat(count)
    x[some] = values[: len(some)]
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _check_twin(x: Tensor, message: Tensor) -> None:
    """foldcp.fabric.transport.wire, which other transports use, makes and reads the same bytes."""
    sent = wire.pack(wire.Message(0, (x,), (True,)), x.device)
    gap = slice(4 * -(-x.numel() // SEGMENT), scale_bytes(x.numel()))
    sent[gap] = 0
    assert torch.equal(sent, message)
    got = torch.full_like(x, 7).contiguous()
    wire.unpack(message, wire.Message(0, (got,), (True,)))
    assert torch.equal(_bits(got), _bits(decode(message, x)))


def _check_fp8(x: Tensor) -> None:
    """Bytes as torch makes them, and what they stand for."""
    message = _pack(x, True)
    plain = x.cpu()
    assert torch.equal(message, encode(plain))
    _check_twin(plain, message)
    got = torch.full_like(x, 7).contiguous()
    _unpack(message, True, got)
    got = got.cpu()
    assert torch.equal(_bits(got), _bits(decode(message, plain)))
    scales = message[: 4 * -(-x.numel() // SEGMENT)].view(torch.float32)
    scale = scales.double().repeat_interleave(SEGMENT)[: x.numel()].reshape(x.shape)
    bound = torch.maximum(plain.double().abs() * 2.0**-4, scale * 2.0**-10)
    assert ((got.double() - plain.double()).abs() <= bound).all()
    # What a ring forwards is not rounded again. A segment whose largest number was rounded down to
    # half of what the scale allows gets another scale, for the same numbers.
    again = _pack(got.to(x.device), True)
    twice = torch.full_like(got, 7).to(x.device)
    _unpack(again, True, twice)
    assert torch.equal(_bits(twice.cpu()), _bits(got))
    assert torch.equal(_pack(twice, True), again)
    kept = scales == again[: 4 * len(scales)].view(torch.float32)
    same = kept.repeat_interleave(SEGMENT)[: x.numel()]
    payload = scale_bytes(x.numel())
    assert torch.equal(again[payload:][same], message[payload:][same])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_of_every_size(dtype: torch.dtype, device: str) -> None:
    for count in (0, 1, 3, 4, 127, 128, 129, 255, 511, 512, 513, 1000, 4099):
        _check_fp8(_numbers(dtype, count).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_of_views(dtype: torch.dtype, view: str, device: str) -> None:
    x = _numbers(dtype, 5 * 9 * 12).view(5, 9, 12)[:4, 1:-1].to(device)
    _check_fp8(VIEWS[view](x))
    if view == "spread":
        return
    base = x.clone()
    target, whole = VIEWS[view](base), torch.zeros_like(base, dtype=torch.bool)
    VIEWS[view](whole).fill_(True)
    message = encode(VIEWS[view](x).cpu())
    target.copy_(torch.zeros_like(target))
    _unpack(message, True, target)
    assert torch.equal(_bits(target.cpu()), _bits(decode(message, target.cpu())))
    assert torch.equal(_bits(base[~whole]), _bits(x[~whole]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_of_one_number_at_a_time(dtype: torch.dtype, device: str) -> None:
    """Each edge in a segment of its own sets the scale."""
    for value in EDGES:
        for sign in (1.0, -1.0):
            x = torch.tensor([sign * value, sign * value / 3], dtype=torch.float64)
            largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
            _check_fp8(x.clamp(-largest, largest).to(dtype).to(device))


@pytest.mark.parametrize("device", DEVICES)
def test_every_fp8_number_is_kept(device: str) -> None:
    """All 256, at several scales: each decodes as in torch and encodes to itself."""
    payload = torch.arange(256, dtype=torch.uint8).repeat(2)
    payload[(payload & 0x7F) == 0x7F] = 0x38
    for exponent in (-126, -60, 0, 60, 119):
        scales = torch.full((4,), 2.0**exponent)
        message = torch.cat([scales.view(torch.uint8), payload])
        x = torch.zeros(512, device=device)
        _unpack(message, True, x)
        assert torch.equal(x.cpu(), payload.view(torch.float8_e4m3fn).float() * 2.0**exponent)
        assert torch.equal(_pack(x, True), message)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_of_what_is_not_finite(dtype: torch.dtype, bad: float, device: str) -> None:
    """It makes its segment NaN (float64 beyond float32's range too), and no other."""
    for place in (0, 130, 255, 299):
        x = torch.randn(300, dtype=torch.float64).to(dtype)
        x[place] = torch.tensor(bad, dtype=torch.float64).to(dtype)
        got = torch.zeros(300, dtype=dtype, device=device)
        message = _pack(x.to(device), True)
        _unpack(message, True, got)
        first = place // SEGMENT * SEGMENT
        wrong = torch.zeros(300, dtype=torch.bool)
        wrong[first : first + SEGMENT] = True
        assert torch.equal(got.isnan().cpu(), wrong)
        assert torch.equal(message[scale_bytes(300) :] == 0x7F, wrong)
        assert torch.equal(got.cpu()[~wrong], decode(encode(x), x)[~wrong])


def test_fp8_is_for_floats() -> None:
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool):
        x, message = torch.zeros(8).to(dtype), torch.zeros(64, dtype=torch.uint8)
        for call in (operators().pack_piece, operators().unpack_piece):
            pair = (x, True, message) if call == operators().pack_piece else (message, True, x)
            with pytest.raises(RuntimeError, match="the FP8 wire takes float64, float32, float16"):
                call(*pair)
    with pytest.raises(RuntimeError, match="at most 8 dimensions"):
        operators().pack_piece(torch.zeros([1] * 9), False, torch.zeros(64, dtype=torch.uint8))
