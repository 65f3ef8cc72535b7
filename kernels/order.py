"""Kernel order: the same codes, arranged so that a GPU reads 16 bytes at a time and multiplies them where they land.

The checkpoint keeps the plain order of `layouts.py`: it is what people read, it wastes nothing on small matrices, and
any other kernel can start from it. `arrange` turns it into kernel order once, when a weight first meets a GPU; `plain`
turns it back bit for bit.

A weight `[N, K]` is cut into `T = ceil(K / 256)` tiles of 256 columns (the last one padded with code 0), a tile into 8
chunks of 32 columns, a chunk into 4 lanes of 8 columns:

    column = 256 tile + 32 chunk + 8 lane + 4 r + 2 e + p        chunk 0-7, lane 0-3, r e p 0-1

Codes of 3, 5, 6, 7 and 8 bits are split into planes of 4, 2 and 1 bits, lowest bits first: 3 = 2+1, 5 = 4+1, 6 = 4+2,
7 = 4+2+1, 8 = 4+4. A plane of `b` bits takes `2b` words of 32 bits for each row, tile and lane; word `w` holds the
chunks `w (4/b)` to `(w+1) (4/b) - 1`, and in it

    bit = 16 p + b (4 (chunk mod 4/b) + 2 r + e)

so that one shift and one mask give two codes in the two halves of a register, where a float16 or bfloat16 pair belongs.
The four lanes are those four threads of a tensor core instruction (PTX ISA, mma.m16n8k16, fragments of A and B) that
hold one row; which 8 of the 32 columns a thread holds is free, as long as `x` is read the same way, and here each
thread gets 8 neighbours: 16 bytes of `x`. In memory:

    weight   int32     [T, pieces, N, 4, w]   a piece is a plane's 4 words per lane (a plane of 4 bits has two, of 1 bit
                                              one of 2 words): 32 threads read 8 rows x 4 lanes x 16 bytes in one go
    scales   f16/bf16  [G, N]
    zeros    uint8     [G, N]                 asymmetric specs only, one byte each
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.available import runs_triton
from quant.kernels.layouts import PackedUniform, rows_at_once
from quant.kernels.packing import pack
from quant.kernels.spec import Uniform

TILE, CHUNK = 256, 32

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}
"""Bits of the planes of a code, lowest first."""


@dataclass(frozen=True, eq=False)
class Arranged:
    """A uniform weight of `shape` `[N, K]` in kernel order: `weight` int32 `[T * 8 * bits * N]`, `scales` `[G, N]`,
    `zeros` uint8 `[G, N]` or None."""

    spec: Uniform
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """As `PackedUniform.dequantize`, bit for bit."""
        from quant.kernels import launch  # it needs this module

        rows = range(self.shape[0])[start:stop]
        if runs_triton(self.weight):
            return launch.dequantize(self, dtype, rows.start, rows.stop)
        return plain(self).dequantize(dtype, rows.start, rows.stop)

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the spec's tensors."""
        held = {"weight": self.weight, "scales": self.scales}
        return held if self.zeros is None else {**held, "zeros": self.zeros}

    def rows(self, index: Tensor) -> Arranged:
        """The weight of the rows `index` int64 `[n]`."""
        places = _places(self.weight.view(tiles(self.shape[1]), -1), self.spec.bits, self.shape[0])
        weight = torch.cat([place.index_select(1, index).flatten(1) for place in places], 1).flatten()
        zeros = None if self.zeros is None else self.zeros.index_select(1, index)
        return Arranged(self.spec, (len(index), self.shape[1]), weight, self.scales.index_select(1, index), zeros)


def tiles(columns: int) -> int:
    return -(-columns // TILE)


def pieces(bits: int) -> list[tuple[int, int, int, int]]:
    """`(plane's bits, shift of its bits in the code, first word, words)` of each piece in the order of memory."""
    found, shift = list[tuple[int, int, int, int]](), 0
    for plane in PLANES[bits]:
        found += [(plane, shift, first, min(4, 2 * plane)) for first in range(0, 2 * plane, 4)]
        shift += plane
    return found


def arrange(packed: PackedUniform, begin: int = 0, end: int | None = None) -> Arranged:
    """Kernel order of a packed weight, or of its rows `begin` to `end`, on its device."""
    part, columns = slice(begin, end), packed.shape[1]
    rows = len(range(packed.shape[0])[part])
    bits, count = packed.spec.bits, tiles(columns)
    weight = torch.empty((count, 8 * bits * rows), dtype=torch.int32, device=packed.device)
    places = _places(weight, bits, rows)
    step = rows_at_once(packed.device, columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        codes = torch.nn.functional.pad(packed.codes(begin + start, begin + stop), (0, count * TILE - columns))
        for (plane, shift, first, words), place in zip(pieces(bits), places, strict=True):
            place[:, start:stop] = _words((codes >> shift) & (2**plane - 1), plane, first, words)
    zeros = None if packed.zeros is None else _own(packed.zero_points(begin, end).T.to(torch.uint8))
    return Arranged(packed.spec, (rows, columns), weight.flatten(), _own(packed.scales[part].T), zeros)


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own, which begins where 16 bytes can be read at once."""
    return tensor.clone(memory_format=torch.contiguous_format)


def plain(arranged: Arranged) -> PackedUniform:
    """The inverse of `arrange`, bit for bit."""
    rows, columns = arranged.shape
    bits, count = arranged.spec.bits, tiles(columns)
    places = _places(arranged.weight.view(count, -1), bits, rows)
    stored = torch.empty(arranged.spec.tensors(arranged.shape)["weight"].shape, dtype=torch.uint8)
    packed = stored.to(arranged.weight.device).view(rows, -1)
    step = rows_at_once(packed.device, columns)
    for start in range(0, rows, step):
        some = min(step, rows - start)
        codes = torch.zeros((some, count, TILE // CHUNK, CHUNK), dtype=torch.uint8, device=packed.device)
        for (plane, shift, first, words), place in zip(pieces(bits), places, strict=True):
            chunks = slice(first * 4 // plane, (first + words) * 4 // plane)
            codes[:, :, chunks] |= _codes(place[:, start : start + some], plane) << shift
        packed[start : start + some] = pack(codes.view(some, -1)[:, :columns].contiguous(), bits)
    zeros = None if arranged.zeros is None else pack(arranged.zeros.T.contiguous(), bits)
    return PackedUniform(arranged.spec, arranged.shape, packed.flatten(), arranged.scales.T.contiguous(), zeros)


def _places(weight: Tensor, bits: int, rows: int) -> list[Tensor]:
    """Views `[T, N, 4, w]` of the pieces in `weight` `[T, 8 * bits * N]`."""
    sizes = [4 * words * rows for *_, words in pieces(bits)]
    parts = weight.split(sizes, 1)
    return [part.view(-1, rows, 4, part.shape[1] // (4 * rows)) for part in parts]


def _words(codes: Tensor, plane: int, first: int, words: int) -> Tensor:
    """Codes of one plane uint8 `[n, T * 256]` to the words `[T, n, 4, words]` of one piece."""
    each = 4 // plane  # chunks in a word
    parts = codes.view(len(codes), -1, 2 * plane, each, 4, 2, 2, 2)[:, :, first : first + words]
    made = torch.zeros((*parts.shape[:3], 4), dtype=torch.int32, device=codes.device)
    for bit, index in _bits(plane):
        made |= parts[:, :, :, index[0], :, index[1], index[2], index[3]].int() << bit
    return made.permute(1, 0, 3, 2)


def _codes(words: Tensor, plane: int) -> Tensor:
    """Words `[T, n, 4, w]` of a piece to its codes uint8 `[n, T, chunks, 32]`."""
    words = words.permute(1, 0, 3, 2)
    each = 4 // plane
    codes = torch.empty((*words.shape[:3], each, 4, 2, 2, 2), dtype=torch.uint8, device=words.device)
    for bit, index in _bits(plane):
        codes[:, :, :, index[0], :, index[1], index[2], index[3]] = ((words >> bit) & (2**plane - 1)).byte()
    return codes.view(*words.shape[:2], -1, CHUNK)


def _bits(plane: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Every bit position of a word with the `(chunk in it, r, e, p)` whose code starts there."""
    return [
        (16 * p + plane * (4 * chunk + 2 * r + e), (chunk, r, e, p))
        for chunk in range(4 // plane)
        for r in range(2)
        for e in range(2)
        for p in range(2)
    ]
