"""Codes of 1 to 16 bits as dense bytes, and back.

Each row of codes is one little-endian bit stream, least significant bit first: code `i` takes the bits `i * bits` to
`(i + 1) * bits - 1` of its row, and bit `b` of the stream is bit `b % 8` of byte `b // 8`. A row ends on a byte; the
padding bits are zero. At 3 bits the codes a b c d e f g h make the bytes `ccbbbaaa feeedddc hhhgggff`, high bit first.

The pattern repeats after `lcm(8, bits)` bits, so packing is a loop over the few codes of one period, each step an
operation on all periods at once in uint8: no wider words, no dependence on the machine's byte order, no copy larger
than the codes. Codes of 9 to 16 bits lie in two planes: first a row's low bytes, then its high bits, packed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_bytes(n: int, bits: int) -> int:
    """Bytes of one packed row of `n` codes."""
    return math.ceil(n * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` uint8 `[rows, n]`, each below `2^bits`, to uint8 `[rows, ceil(n * bits / 8)]`.

    Raises `ValueError` on another dtype, on a code that does not fit and on bits outside 1-8.
    """
    _check(codes, bits, "codes")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes reach {int(codes.max())}; {bits} bits hold at most {2**bits - 1}")
    rows, n = codes.shape
    period, width = _period(bits)
    whole = math.ceil(n / period)
    if whole * period != n:
        codes = torch.nn.functional.pad(codes, (0, whole * period - n))
    codes = codes.reshape(rows, whole, period)
    packed = torch.zeros((rows, whole, width), dtype=torch.uint8, device=codes.device)
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= codes[..., index] << shift  # bits beyond the byte fall off here ...
        if shift + bits > 8:
            packed[..., byte + 1] |= codes[..., index] >> (8 - shift)  # ... and land in the next one
    return packed.view(rows, whole * width)[:, : row_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """`packed` uint8 `[rows, ceil(n * bits / 8)]` to codes uint8 `[rows, n]`: the inverse of `pack`.

    Raises `ValueError` on another dtype or a row length that does not hold `n` codes.
    """
    _check(packed, bits, "packed")
    rows, length = packed.shape
    if length != row_bytes(n, bits):
        raise ValueError(f"packed rows have {length} bytes; {n} codes of {bits} bits take {row_bytes(n, bits)}")
    if bits == 8:
        return packed.clone()
    period, width = _period(bits)
    whole = math.ceil(n / period)
    if whole * width != length:
        packed = torch.nn.functional.pad(packed, (0, whole * width - length))
    packed = packed.reshape(rows, whole, width)
    codes = torch.empty((rows, whole, period), dtype=torch.uint8, device=packed.device)
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        value = packed[..., byte] >> shift
        if shift + bits > 8:
            value |= packed[..., byte + 1] << (8 - shift)
        codes[..., index] = value.bitwise_and_(2**bits - 1)
    return codes.view(rows, whole * period)[:, :n]


def padding_is_zero(packed: Tensor, bits: int, n: int) -> bool:
    """Whether the bits after the last code of every row are zero, as `pack` leaves them."""
    used = n * bits % 8
    return used == 0 or packed.numel() == 0 or not bool((packed[:, -1] >> used).any())


def plane_bytes(n: int, bits: int) -> int:
    """Bytes of one row of `n` codes of 1 to 16 bits, in planes."""
    return row_bytes(n, min(bits, 8)) + row_bytes(n, max(bits - 8, 0))


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """`codes` int32 `[rows, n]` of 1 to 16 bits to uint8 `[rows, plane_bytes(n, bits)]`."""
    low = pack((codes & 255).to(torch.uint8), min(bits, 8))
    return low if bits <= 8 else torch.cat([low, pack((codes >> 8).to(torch.uint8), bits - 8)], 1)


def unpack_planes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_planes`: int32 `[rows, n]`."""
    if bits <= 8:
        return unpack(packed, bits, n).int()
    return unpack(packed[:, :n], 8, n).int() | unpack(packed[:, n:], bits - 8, n).int() << 8


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the pattern of bits repeats."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _check(tensor: Tensor, bits: int, name: str) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; codes have 1 to 8 bits")
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise ValueError(f"{name} are {tensor.dtype} of shape {list(tensor.shape)}; uint8 [rows, n] is expected")
