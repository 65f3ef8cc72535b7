"""The Triton kernel that decodes codebook weights in kernel order: for many tokens, and for the backward pass.

A program decodes a tile of 16 vector rows and 128 columns, eight columns of a lane at a time, and stores 16 bytes of a
row. The second index of a column lies at that column's place among the finer ones, wherever this is, so it is read word
by word; there are a few of them.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RUF005, SIM108
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.codebook_product import four, index_of, rows_of, scale_of, tile_words, vectors


@triton.jit
def _word(tile, cell, word, BITS: tl.constexpr):
    """One word of a cell of a tile."""
    WHOLE: tl.constexpr = BITS // 4 * 4
    at = word // 4 * 256 + cell * 4 + word % 4
    if BITS & 2:
        at = tl.where(word >= WHOLE, WHOLE * 64 + cell * 2 + (word - WHOLE), at)
    if BITS & 1:
        at = tl.where(word >= BITS - 1, (BITS - 1) * 64 + cell, at)
    return tl.load(tile + at).to(tl.uint32, bitcast=True)


@triton.jit
def _second(stream, place, BITS: tl.constexpr):
    """The second indices `[16, 4 lanes]` at places `[4]` of a row of tiles; 0 where a place is below 0."""
    there = tl.maximum(place, 0)
    tile = stream + (there // 128).to(tl.int64)[None, :] * (64 * BITS)
    cell = tl.arange(0, 16)[:, None] * 4 + (there % 128 // 32)[None, :]
    bit = there % 32 * BITS
    word, shift = bit // 32, (bit % 32)[None, :]
    low = _word(tile, cell, word[None, :], BITS)
    high = _word(tile, cell, tl.minimum(word + 1, BITS - 1)[None, :], BITS)
    return (low >> shift | high << 1 << 31 - shift) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=("first", "stop", "tile", "tiles", "count", "few", "per"))
def codebook_decode_kernel(
    weight, codebook, second, columns, scales, peaks, table, out,
    first, stop, K, tile, tiles, count, few, per,
    BITS: tl.constexpr, SECOND: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    FEW: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`out` `[stop - first, K]`: these rows of the weight, as `PackedCodebook.dequantize` gives them bit for bit; one
    program per row tile, from `tile` on, of `tiles` in the weight, and column tile, of `count`, those of the same rows
    one after the other."""
    tile += tl.program_id(0) // count
    column = tl.program_id(0) % count
    group, begin, left = rows_of(tile, per, LENGTH, GROUP)
    lanes = column * 128 + tl.arange(0, 4) * 32
    codebook += (tl.cast(group, tl.int64) << BITS) * WIDTH
    second += (tl.cast(group, tl.int64) << SECOND) * WIDTH
    columns += tl.cast(group, tl.int64) * (few + K) + few
    after = weight + tl.cast(tiles, tl.int64) * count * (64 * BITS)
    after += tl.cast(tile, tl.int64) * ((few + 127) // 128) * (64 * SECOND)
    peak = tl.load(peaks + group).to(tl.float32)
    words = tile_words(weight + (tl.cast(tile, tl.int64) * count + column) * (64 * BITS), BITS)
    for step in tl.static_range(4):
        base, fine = (), ()
        for i in tl.static_range(8):
            base = base + (vectors(codebook, index_of(words, step * 8 + i, BITS), WIDTH, NATIVE),)
            if SECOND > 0:
                place = lanes + step * 8 + i
                if FEW:
                    place = tl.load(columns + place, mask=place < K, other=-1)
                else:
                    place = tl.where(place < K, place, -1)
                value = vectors(second, _second(after, place, SECOND), WIDTH, NATIVE)
                kept = ()
                for part in tl.static_range(WIDTH // 2):
                    kept = kept + (tl.where((place >= 0)[None, :], value[part], 0),)
                fine = fine + (kept,)
        here = lanes[:, None] + step * 8 + tl.arange(0, 8)[None, :]
        for j in tl.static_range(LENGTH):
            value = _eight(base, j)
            if SECOND > 0:
                value += _eight(fine, j)
            rows = begin + j
            inside = (left > j) & (rows >= first) & (rows < stop)
            value *= scale_of(scales, table, peak, rows, inside)[:, None, None]
            places = out + (rows - first)[:, None, None].to(tl.int64) * K + here[None, :, :]
            fits = inside[:, None, None] & (here < K)[None, :, :]
            tl.store(places, value.to(out.dtype.element_ty), mask=fits)


@triton.jit
def _eight(found, ROW: tl.constexpr):
    """Place ROW of the vectors of eight columns, float32 `[16, 4 lanes, 8]`."""
    return tl.reshape(tl.join(four(found, 0, 2, ROW), four(found, 1, 2, ROW)), (16, 4, 8)).to(tl.float32)
