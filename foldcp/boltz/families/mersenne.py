"""Skip numbers of a Mersenne Twister without drawing them, in milliseconds for any count.

The generator of NumPy's global functions and of torch on a CPU makes words

    x[k+624] = x[k+397] ^ A (high bit of x[k], low 31 bits of x[k+1])

with a matrix A over GF(2). All of this is linear: with the characteristic polynomial p of a step
and t^n mod p = sum_i c[i] t^i, x[n+j] is the xor of x[i+j] over all i with c[i] = 1.

Source: Matsumoto and Nishimura (1998), ACM TOMACS 8(1), 3-30, section 3 and appendix A;
Haramoto, Matsumoto, Nishimura, Panneton, L'Ecuyer (2008), INFORMS J. Comput. 20(3), 385-390.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from operator import xor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

N, M, BITS, LOW = 624, 397, 32, 31  # words of a state; the offset; bits of a word; of its low part
DEGREE = N * BITS - LOW
_A = 0x9908B0DF
Words = NDArray[np.uint32]


def skip(key: Words, position: int, count: int) -> tuple[Words, int]:
    """Advance a generator as if it had drawn `count` words.

    Args:
        key: its state, [624].
        position: of the next word in it, 0 to 624; at 624 the next state is made first.
        count: words of 32 bits to skip, at least 0.

    Returns:
        State and position after these draws, as the generator itself would hold them: position is
        1 to 624, unless `count` is 0.
    """
    if count == 0:
        return key.copy(), position
    # Words of a state stand at steps 0 to 623; the last word drawn is at step `last`.
    last = position + count - 1
    passed, at = divmod(last, N)
    return _jumped(key, passed * N), at + 1


def _jumped(key: Words, steps: int) -> Words:
    """The words [624] that stand `steps` further on."""
    if steps == 0:
        return key.copy()
    # The low bits of the oldest word belong to no state: go one step less, and take the next one.
    rest = power_of_t(steps - 1)
    bits = np.frombuffer(rest.to_bytes(-(-DEGREE // 8), "little"), np.uint8)
    chosen = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
    words = _sequence(key, int(chosen[-1]) + N + 1)
    found = np.zeros(N + 1, np.uint32)
    for part in np.array_split(chosen, max(1, len(chosen) // 1000)):
        windows = sliding_window_view(words, N + 1)[part]
        found ^= np.bitwise_xor.reduce(windows, axis=0)
    return found[1:]


def _sequence(key: Words, count: int) -> Words:
    """The first `count` words from a state on, untempered."""
    states = -(-count // N)
    words = np.empty((states + 1) * N, np.uint32)
    words[:N] = key
    # x[k+397] of a word is known for 227 words at a time.
    for k in range(0, states * N, N - M):
        end = min(k + N - M, states * N)
        mixed = (words[k:end] & 0x80000000) | (words[k + 1 : end + 1] & 0x7FFFFFFF)
        twisted = (mixed >> 1) ^ np.where(mixed & 1, np.uint32(_A), np.uint32(0))
        words[k + N : end + N] = words[k + M : end + M] ^ twisted
    return words[:count]


@lru_cache(maxsize=8)
def power_of_t(exponent: int) -> int:
    """Return t^exponent modulo the characteristic polynomial; bit i is the coefficient of t^i."""
    found = 1
    for bit in f"{exponent:b}":
        # The square of a polynomial over GF(2) has its bits at the doubled places.
        found = _reduced(int("0".join(f"{found:b}"), 2))
        if bit == "1":
            found = _reduced(found << 1)
    return found


def _reduced(polynomial: int) -> int:
    """A polynomial modulo the characteristic one."""
    below = characteristic()
    while high := polynomial >> DEGREE:
        polynomial ^= high << DEGREE
        polynomial = reduce(xor, (high << place for place in below), polynomial)
    return polynomial


@lru_cache(maxsize=1)
def characteristic() -> tuple[int, ...]:
    """List the exponents of a step's characteristic polynomial, without the first, 19937."""
    first: set[int] = {N, M}  # t^n + t^m
    other = {0}
    powers = [other]  # of t^(n-1) + t^(m-1)
    for _ in range(LOW):
        other = _product(other, {N - 1, M - 1})
        powers.append(other)
    found = _product(first, powers[LOW])
    for place in range(LOW):
        if _A >> place & 1:
            found ^= _product(first, powers[LOW - 1 - place])
    if _A >> LOW & 1:
        found ^= {0}
    return tuple(sorted(found - {DEGREE}))


def _product(a: set[int], b: set[int]) -> set[int]:
    """Multiply two polynomials over GF(2), given as sets of exponents."""
    return reduce(xor, ({x + y for x in a} for y in b), set[int]())
