"""Kernel order of a trellis weight: units of 16 rows, so that every state lies inside one 32-bit register.

The checkpoint stores each column's stream on its own (`trellis.py`): compact, but neighbouring columns are far apart.
`arrange` interleaves them once, when a weight first meets a GPU; `plain` turns it back bit for bit.

A unit is 16 rows of one column: `16 b` bits of its stream, the `b` half words `h_0 .. h_(b-1)` of 16 bits. The state of
row `j` of a unit begins at bit `16 h + s = b j`, so with windows of at most 16 bits and `s < 16` it lies within the 32
bits `h_h | h_(h+1) << 16`, where `h_b` is `h_0` of the next unit. Columns are padded with zeros to chunks of 32,

    column = 32 chunk + 8 lane + 4 side + i        lane 0-3, side 0-1, i 0-3

and the half words go to 32-bit words in pieces: `b // 2` times two pieces, one per side, whose words are two
neighbouring half words; then, where `b` is odd, one piece whose words hold the last half words of both sides:

    weight   int32  [chunks, b, units, 4 lanes, 4 i]
                    piece 2 q + side, q < b // 2:    h_2q  | h_(2q+1) << 16   of one side
                    piece b - 1, where b is odd:     h_(b-1) of side 0  |  h_(b-1) of side 1 << 16
    scales   uint8  [out]           as stored
    peaks    f16    [sequences]     as stored
    table    f16    [entries, 2]    as stored, of `hyb`

So a thread reads 16 bytes, four columns of one unit, and 4 lanes x 8 units are 512 bytes in a row; four lanes and eight
units are also how a tensor core instruction (PTX ISA, mma.m16n8k16) holds its left operand.

Sequences of `length` rows are whole units, and after the last unit of one comes its first again. A shorter sequence at
the end need not end with a unit: its stream is written on, from its beginning, into as many units as its rows take and
one or two more, so that their number is even. Units: `length / 16` for each whole sequence, and those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.available import runs_triton
from quant.kernels.spec import Trellis
from quant.kernels.trellis import PackedTrellis

UNIT, CHUNK = 16, 32


@dataclass(frozen=True, eq=False)
class ArrangedTrellis:
    """A trellis weight of `shape` `[out, in]` in kernel order; see the module. `weight` is flat."""

    spec: Trellis
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    peaks: Tensor
    table: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the spec's tensors."""
        found = {"weight": self.weight, "scales": self.scales, "peaks": self.peaks}
        return found if self.table is None else {**found, "table": self.table}

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """As `PackedTrellis.dequantize`, bit for bit."""
        from quant.kernels import trellis_launch  # it needs this module

        rows = range(self.shape[0])[start:stop]
        if runs_triton(self.weight):
            return trellis_launch.dequantize(self, dtype, rows.start, rows.stop)
        return plain(self).dequantize(dtype, rows.start, rows.stop)


def chunks(columns: int) -> int:
    return -(-columns // CHUNK)


def units(rows: int, length: int) -> tuple[int, int]:
    """Units of the whole sequences, and of all."""
    whole, rest = divmod(rows, length)
    each = length // UNIT
    return whole * each, whole * each + (-(-rest // UNIT) // 2 * 2 + 2 if rest else 0)


def arrange(packed: PackedTrellis, begin: int = 0, end: int | None = None) -> ArrangedTrellis:
    """Kernel order of a packed weight, or of its rows `begin` to `end`, on its device. Only the last row may lie within
    a sequence."""
    spec, columns = packed.spec, packed.shape[1]
    rows = range(packed.shape[0])[begin:end]
    if rows.start % spec.length or (rows.stop % spec.length and rows.stop < packed.shape[0]):
        raise ValueError(f"rows {rows.start} to {rows.stop} of sequences of {spec.length}; whole ones are expected")
    at, halves = rows.start * spec.bits // 8 * columns, list[Tensor]()
    whole = len(rows) // spec.length
    if whole:
        size = whole * spec.length * spec.bits // 8 * columns
        stream = packed.weight[at : at + size].clone().view(torch.int16)  # cloned: a slice may begin anywhere
        stream = stream.view(whole, columns, -1, spec.bits).transpose(1, 2)
        halves.append(stream.reshape(-1, columns, spec.bits))
        at += size
    rest = len(rows) % spec.length
    if rest:
        stream = packed.weight[at:].view(columns, -1)
        length = units(rest, spec.length)[1] * 2 * spec.bits
        circle = torch.arange(length, device=stream.device) % stream.shape[1]
        halves.append(stream[:, circle].view(torch.int16).view(columns, -1, spec.bits).transpose(0, 1))
    scales = packed.scales[rows.start : rows.stop]
    peaks = packed.peaks[rows.start // spec.length : -(-rows.stop // spec.length)]
    weight = _interleave(torch.cat(halves), spec.bits)
    return ArrangedTrellis(spec, (len(rows), columns), weight, scales.contiguous(), peaks.contiguous(), packed.table)


def plain(arranged: ArrangedTrellis) -> PackedTrellis:
    """The inverse of `arrange`, bit for bit."""
    spec, (rows, columns) = arranged.spec, arranged.shape
    whole, count = units(rows, spec.length)
    halves = _separate(arranged.weight, spec.bits, count)[:, :columns]
    each = spec.length // UNIT
    stream = halves[:whole].view(-1, each, columns, spec.bits).transpose(1, 2)
    streams = [stream.contiguous().view(torch.uint8).flatten()]
    if rows % spec.length:
        padded = spec.sequences(rows)[-1][1]
        rest = halves[whole:].transpose(0, 1).contiguous().view(columns, -1).view(torch.uint8)
        streams.append(rest[:, : padded * spec.bits // 8].flatten())
    return PackedTrellis(spec, arranged.shape, torch.cat(streams), arranged.scales, arranged.peaks, arranged.table)


def _interleave(halves: Tensor, bits: int) -> Tensor:
    """Half words int16 `[units, columns, bits]` to the flat kernel order."""
    count = chunks(halves.shape[1])
    halves = torch.nn.functional.pad(halves, (0, 0, 0, count * CHUNK - halves.shape[1]))
    halves = halves.view(len(halves), count, 4, 2, 4, bits)
    weight = halves.new_empty((count, bits, len(halves), 4, 4, 2))
    even = bits // 2 * 2
    pairs = halves[..., :even].unflatten(-1, (-1, 2))  # [units, chunks, lane, side, i, q, 2]
    weight[:, :even] = pairs.permute(1, 5, 3, 0, 2, 4, 6).flatten(1, 2)
    if bits % 2:
        weight[:, even] = halves[..., even].permute(1, 0, 2, 4, 3)
    return weight.view(torch.int32).flatten()


def _separate(weight: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: half words int16 `[units, padded columns, bits]`."""
    words = weight.view(-1, bits, count, 4, 4, 1).view(torch.int16)
    halves = words.new_empty((count, len(words), 4, 2, 4, bits))
    even = bits // 2 * 2
    if even:
        halves[..., :even] = words[:, :even].unflatten(1, (-1, 2)).permute(3, 0, 4, 2, 5, 1, 6).flatten(-2)
    if bits % 2:
        halves[..., even] = words[:, even].permute(1, 0, 2, 4, 3)
    return halves.view(count, -1, bits)
