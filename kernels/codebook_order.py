"""Kernel order of a codebook weight: cells of 32 indices, so that every index has its place in known registers.

The checkpoint stores a vector row's indices as bytes and then their high bits (`packing.py`), rows of any length: no
load wider than a byte is aligned, and those of 16 rows are far apart. `arrange` interleaves them once, when a weight
first meets a GPU; `plain` turns it back bit for bit.

The vector rows of a group are padded to tiles of 16, columns to tiles of 128,

    column = 128 tile + 32 lane + i        lane 0-3, i 0-31

and 32 indices of `b` bits make the `b` words of a cell: index `i` begins at bit `b i`, least significant first. A
tile's words lie in pieces of 4, then one of 2 where `b & 2`, then one of 1 where `b & 1`:

    weight    int32  [row tiles, column tiles, pieces [16 rows, 4 lanes, words of a piece]]   first indices
                     then the same of the second ones, whose columns are the finer ones in ascending order
    codebook  f16    [groups, 2^index_bits, width]     width: length, padded with zeros to 2, 4, 8 or 16
    second    f16    [groups, 2^second_bits, width]
    columns   int32  [groups, finer + in]              the finer columns; then each column's place among them, or -1
    scales    uint8  [out]                             as stored
    peaks     f16    [groups]                          as stored

So a program reads one stretch of memory from end to end, a thread 16 bytes at a time, and a vector is one load of up to
16 bytes. Four lanes and eight rows are also how a tensor core instruction (PTX ISA, mma.m16n8k16) holds its left
operand, and a program's 16 vector rows share a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.kernels.available import runs_triton
from quant.kernels.codebook import Codebook, PackedCodebook, codebook_for
from quant.kernels.packing import pack, pack_planes

ROWS, TILE, CELL = 16, 128, 32


@dataclass(frozen=True, eq=False)
class ArrangedCodebook:
    """A codebook weight of `shape` `[out, in]` in kernel order; see the module. `weight` is flat, `spec` has a length,
    `second` and `columns` are None where the spec has none."""

    spec: Codebook
    shape: tuple[int, int]
    weight: Tensor
    codebook: Tensor
    second: Tensor | None
    columns: Tensor | None
    scales: Tensor
    peaks: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the spec's tensors."""
        held = {"weight": self.weight, "codebook": self.codebook, "second": self.second, "columns": self.columns}
        held |= {"scales": self.scales, "peaks": self.peaks}
        return {name: part for name, part in held.items() if part is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """As `PackedCodebook.dequantize`, bit for bit."""
        from quant.kernels import codebook_launch  # it needs this module

        rows = range(self.shape[0])[start:stop]
        if runs_triton(self.weight):
            return codebook_launch.dequantize(self, dtype, rows.start, rows.stop)
        return plain(self).dequantize(dtype, rows.start, rows.stop)


def column_tiles(columns: int) -> int:
    return -(-columns // TILE)


def row_tiles(spec: Codebook, rows: int) -> list[int]:
    """Tiles of 16 vector rows in each group."""
    return [-(-vectors // ROWS) for vectors in spec.vectors(rows)]


def width(length: int) -> int:
    """Values that a vector takes in a table."""
    return max(2, 1 << (length - 1).bit_length())


def words(spec: Codebook, shape: tuple[int, int]) -> tuple[int, int]:
    """Words of the first indices, and of the second ones."""
    each = sum(row_tiles(spec, shape[0])) * ROWS * 4
    first = each * column_tiles(shape[1]) * spec.index_bits
    return first, each * column_tiles(spec.finer(shape[1])) * spec.second_bits


def arrange(packed: PackedCodebook, begin: int = 0, end: int | None = None) -> ArrangedCodebook:
    """Kernel order of a packed weight, or of its rows `begin` to `end`, on its device. Only whole groups can be cut
    out."""
    spec, columns = packed.spec, packed.shape[1]
    rows = range(packed.shape[0])[begin:end]
    if rows.start % spec.rows or (rows.stop % spec.rows and rows.stop < packed.shape[0]):
        raise ValueError(f"rows {rows.start} to {rows.stop} of groups of {spec.rows}; whole ones are expected")
    groups = range(rows.start // spec.rows, -(-rows.stop // spec.rows))
    at, streams = groups.start * -(-spec.rows // spec.length), (list[Tensor](), list[Tensor]())
    for count in spec.vectors(len(rows)):
        for stream, found, bits in zip(streams, packed.indices(at, at + count), bits_of(spec), strict=False):
            stream.append(_cells(found, bits).flatten())
        at += count
    part = slice(groups.start, groups.stop)
    held = {name: tensor[part] for name, tensor in packed.stored.items() if name not in ("weight", "scales")}
    fill = (0, width(spec.length) - spec.length)
    finer = None
    if "columns" in held:
        finer = torch.stack([_finer(packed.fine(group), columns) for group in groups])
    return ArrangedCodebook(
        spec, (len(rows), columns), torch.cat([*streams[0], *streams[1]]), pad(held["codebook"], fill).contiguous(),
        pad(held["second"], fill).contiguous() if "second" in held else None, finer,
        packed.stored["scales"][rows.start : rows.stop].contiguous(), held["peaks"].contiguous(),
    )  # fmt: skip


def weight_of(spec: Codebook, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> ArrangedCodebook:
    """The weight of tensors in kernel order."""
    held = [tensors[name] for name in ("weight", "codebook")]
    more = [tensors.get(name) for name in ("second", "columns")]
    spec = spec if spec.length else codebook_for(spec, shape)  # torch.compile does not follow a cache
    return ArrangedCodebook(spec, shape, *held, *more, tensors["scales"], tensors["peaks"])  # pyright: ignore[reportArgumentType]


def plain(arranged: ArrangedCodebook) -> PackedCodebook:
    """The inverse of `arrange`, bit for bit."""
    spec, (rows, columns) = arranged.spec, arranged.shape
    sizes, counts, tiles = (columns, spec.finer(columns)), spec.vectors(rows), row_tiles(spec, rows)
    parts = list[Tensor]()
    for stream, bits, size in zip(
        arranged.weight.split(words(spec, arranged.shape)), bits_of(spec), sizes, strict=False
    ):
        cells = stream.view(-1, column_tiles(size), ROWS * 4 * bits).split(tiles)
        found = [_indices(part, bits)[:count, :size] for part, count in zip(cells, counts, strict=True)]
        parts.append(pack_planes(torch.cat(found), bits))
    stored = arranged.tensors()
    stored["weight"] = torch.cat(parts, 1).flatten()
    for name in ("codebook", "second"):
        if name in stored:
            stored[name] = stored[name][..., : spec.length].contiguous()
    if "columns" in stored:
        stored["columns"] = pack((stored["columns"][:, sizes[1] :] >= 0).to(torch.uint8), 1)
    return PackedCodebook(spec, arranged.shape, stored)


def bits_of(spec: Codebook) -> tuple[int, ...]:
    """Of the first and the second indices, if there are any."""
    return (spec.index_bits, spec.second_bits) if spec.second_bits else (spec.index_bits,)


def _finer(fine: Tensor, columns: int) -> Tensor:
    """A row of `columns`."""
    places = torch.full((columns,), -1, dtype=torch.int32, device=fine.device)
    places[fine] = torch.arange(len(fine), dtype=torch.int32, device=fine.device)
    return torch.cat([fine.int(), places])


def _pieces(bits: int) -> list[int]:
    """Words of each piece."""
    return [4] * (bits // 4) + [size for size in (2, 1) if bits & size]


def _cells(index: Tensor, bits: int) -> Tensor:
    """Indices int32 `[vector rows, columns]` of a group to words int32 `[row tiles, column tiles, 64 bits]`."""
    vectors, columns = index.shape
    index = pad(index, (0, -columns % TILE, 0, -vectors % ROWS))
    index = index.view(-1, ROWS, column_tiles(columns), 4, CELL).transpose(1, 2)
    made = torch.zeros((*index.shape[:-1], bits), dtype=torch.int64, device=index.device)
    for i in range(CELL):
        place, shift = divmod(i * bits, 32)
        value = index[..., i].long() << shift
        made[..., place] |= value & 0xFFFFFFFF
        if shift + bits > 32:
            made[..., place + 1] |= value >> 32
    made = made.where(made < 1 << 31, made - (1 << 32)).int()
    return torch.cat([part.flatten(2) for part in made.split(_pieces(bits), -1)], 2)


def _indices(cells: Tensor, bits: int) -> Tensor:
    """The inverse, with the padding."""
    pieces = _pieces(bits)
    parts = cells.split([ROWS * 4 * size for size in pieces], 2)
    whole = [part.unflatten(2, (ROWS, 4, size)) for part, size in zip(parts, pieces, strict=True)]
    held = torch.cat(whole, -1).long() & 0xFFFFFFFF
    index = held.new_empty((*held.shape[:-1], CELL), dtype=torch.int32)
    for i in range(CELL):
        place, shift = divmod(i * bits, 32)
        value = held[..., place] >> shift
        if shift + bits > 32:
            value |= held[..., place + 1] << (32 - shift)
        index[..., i] = value & ((1 << bits) - 1)
    return index.transpose(1, 2).flatten(2).flatten(0, 1)
