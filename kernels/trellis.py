"""Trellis codes: from windows of bits to values, and the packed weight made of them.

`trellis`, for a weight `[out, in]` of `K = bits` bits, window `L`, in sequences of `length` rows (the last may be
shorter; it is padded to whole bytes and at least one window):

    tensor   dtype    shape                          content
    weight   uint8    [in * bytes of all sequences]  sequence after sequence, in each column after column: the column's
                                                     bit stream, least significant bit first
    scales   uint8    [out]                          scale[o] = peak * 2^(-scales[o] / 16); 255 means 0
    peaks    f16      [sequences]                    the largest scale in each sequence; finite
    table    f16      [2^table_bits, 2]              of `hyb` alone; finite

    state[t, i]  = the L bits of column i's stream from bit t*K on, the first bit lowest, the stream's end joined to its
                   beginning
    weight[o, i] = scale[o] * value(state[t, i]),  t = o's place in its sequence

A state of `hyb`, and one of `mac` where K is 1 or 2, has V = 2 values, for two rows, and the stream advances by 2K bits
from state to state.

Values of a state, all in 32-bit integer arithmetic, so that a kernel needs no table (QTIP, arXiv 2406.11235, section 3;
`sum` is the variant of ik_llama.cpp and EXL3 that fits int8 products):

    inst   y = 89226354 state + 64248484, y = (y & 0x8fff8fff) ^ 0x3b603b60, value = its two float16 halves added
    mac    y = 437406744 state + 2580090504, value = sum of its bytes - 510; of two, the second is the sum of bytes 0
           and 2 less that of bytes 1 and 3 (the lowest is 0)
    sum    y = 89226354 state + 64248484, value = sum of the low 6 bits of its bytes - 126
    hyb    y = state^2 + state, values = row (y >> (15 - table_bits)) mod 2^table_bits of the table; bit 15 of y flips
           the sign of the first. The table begins as k-means of Gaussian pairs and can be trained.

The values look like independent Gaussian draws; their deviation goes into the scales. Mean squared error on Gaussian
input at 2 bits and L = 12: 0.0732 (`inst`), 0.0745 (`mac`), 0.078 (`sum`), 0.077 (`hyb`); `mac` has 0.0735 at L = 13. A
scalar grid cannot get below 0.1175, and no code below 0.0625. `mac` is the default: it takes the fewest instructions by
far (`trellis_product.py`). Two values of a state are the same four bytes with signs that make them uncorrelated, and
cost 3 % in error against a state for each. Its numbers are the best that `benchmarks/codes.py` found; the first is a
multiple of 8, which saves a kernel shifts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from quant.kernels.packed import LayoutError, Packed
from quant.kernels.packing import pack
from quant.kernels.scales import NO_SCALE as NO_SCALE
from quant.kernels.scales import scale_codes as scale_codes
from quant.kernels.scales import scale_values
from quant.kernels.spec import Trellis
from quant.kernels.viterbi import pool

MANY = 1 << 18  # weights from which a second thread is worth waking
MAC = (437406744, 2580090504)


@torch.compiler.assume_constant_result  # or each product of a compiled model would make the table anew
def values(code: str, window: int, vector: int = 1) -> Tensor:
    """The values of every state of a code without a table, float32 `[vector, 2^window]`; each is exact in float16."""
    return _values(code, window, vector)


@cache
def _values(code: str, window: int, vector: int) -> Tensor:
    state = torch.arange(1 << window, dtype=torch.int64)
    if code == "mac":
        word = (MAC[0] * state + MAC[1]) & 0xFFFFFFFF
        even, odd = _bytes(word, (0, 16), 0xFF), _bytes(word, (8, 24), 0xFF)
        return torch.stack((even + odd - 510, even - odd)[:vector])
    word = (89226354 * state + 64248484) & 0xFFFFFFFF
    if code == "sum":
        return _bytes(word, (0, 8, 16, 24), 0x3F)[None] - 126
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    halves = torch.stack((word >> 16, word & 0xFFFF))
    signed = torch.where(halves >= 1 << 15, halves - (1 << 16), halves).to(torch.int16)
    return signed.view(torch.float16).float().sum(0, keepdim=True).half().float()


def state_values(spec: Trellis, table: Tensor | None) -> Tensor:
    """The values of every state, float32 `[vector, 2^window]`; `table`: of `hyb`, else None. Differentiable in it."""
    if table is None:
        return values(spec.code, spec.window, spec.vector)
    state = torch.arange(1 << spec.window, dtype=torch.int64, device=table.device)
    word = state * state + state
    first, second = table.float()[word >> 15 - spec.table_bits & (1 << spec.table_bits) - 1].T
    return torch.stack((torch.where(word >> 15 & 1 == 1, -first, first), second))


def read(values: Tensor, states: Tensor) -> Tensor:
    """What `states` `[..., steps]` stand for, `[..., steps * vector]`; `values` as of `state_values`."""
    if len(values) == 1:  # a gather of single values is faster, and weights are read by it
        return values[0][states]
    return values.T[states].flatten(-2)


def deviation(values: Tensor) -> float:
    """The standard deviation of the values of all states."""
    return float(values.double().std(correction=0))


@dataclass(frozen=True, eq=False)
class PackedTrellis(Packed):
    """See the module."""

    layout: ClassVar[str] = "trellis"
    shared: ClassVar[tuple[str, ...]] = ("table",)

    spec: Trellis  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: a narrower type is sound
    weight: Tensor
    scales: Tensor
    peaks: Tensor
    table: Tensor | None = None

    @classmethod
    def from_states(
        cls, spec: Trellis, shape: tuple[int, int], states: list[Tensor], scales: Tensor, peaks: Tensor,
        table: Tensor | None = None,
    ) -> Self:  # fmt: skip
        """From the `states` `[in, padded rows / vector]` of each sequence, `scales` uint8 `[out]`, `peaks` f16
        `[sequences]` and the `table` of `hyb`.

        Raises `LayoutError` where neighbouring states do not share their bits.
        """
        streams = list[Tensor]()
        for number, state in enumerate(states):
            if not bool(((state >> spec.step) == (state.roll(-1, 1) & ((1 << spec.window - spec.step) - 1))).all()):
                raise LayoutError(f"sequence {number}: neighbouring states do not share their bits")
            streams.append(pack((state & ((1 << spec.step) - 1)).to(torch.uint8), spec.step).flatten())
        found = {"weight": torch.cat(streams), "scales": scales, "peaks": peaks}
        return cls.from_tensors(spec, shape, found if table is None else {**found, "table": table})

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "scales": self.scales, "peaks": self.peaks}
        return found if self.table is None else {**found, "table": self.table}

    def stream_bytes(self) -> list[int]:
        """Bytes of a column's stream in each sequence."""
        return [padded * self.spec.bits // 8 for _, padded in self.spec.sequences(self.shape[0])]

    def states(self, sequence: int) -> Tensor:
        """States int32 `[in, padded rows / vector]` of one sequence."""
        spec, columns, sizes = self.spec, self.shape[1], self.stream_bytes()
        begin, length = sum(sizes[:sequence]) * columns, sizes[sequence]
        stream = self.weight[begin : begin + columns * length].view(columns, length).int()
        words = stream | stream.roll(-1, 1) << 8 | stream.roll(-2, 1) << 16  # 24 bits hold any window from any bit on
        common = math.gcd(8, spec.step)
        period, width = 8 // common, spec.step // common  # steps and bytes after which the pattern repeats
        states = words.new_empty((columns, length * 8 // spec.step))
        for place in range(period):
            byte, shift = divmod(place * spec.step, 8)
            states[:, place::period] = (words[:, byte::width] >> shift) & ((1 << spec.window) - 1)
        return states

    def values(self) -> Tensor:
        """Of every state, float32 `[vector, 2^window]`."""
        return state_values(self.spec, self.table).to(self.device)

    def row_scales(self) -> Tensor:
        """Scales float32 `[out]`."""
        return scale_values(self.scales, self.peaks.repeat_interleave(self.spec.length)[: self.shape[0]])

    def dequantize(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        rows = range(self.shape[0])[start:stop]
        known, scales, length = self.values(), self.row_scales(), self.spec.length
        if self.device.type == "cpu":
            code = known.detach().T.contiguous(), self.spec.step, self.spec.window
            asked = scales[rows.start : rows.stop], rows.start, dtype
            return _decode(self.weight, self.stream_bytes(), length, *code, *asked)
        weight = torch.empty((len(rows), self.shape[1]), dtype=dtype, device=self.device)
        for sequence in range(rows.start // length, math.ceil(rows.stop / length) if len(rows) else 0):
            first = sequence * length
            begin, end = max(rows.start, first), min(rows.stop, first + length)
            found = read(known, self.states(sequence))[:, begin - first : end - first].T
            weight[begin - rows.start : end - rows.start] = found * scales[begin:end, None]
        return weight

    def validate(self) -> None:
        if not bool((torch.isfinite(self.peaks) & (self.peaks >= 0)).all()):
            raise LayoutError("peaks: every one must be finite and at least 0")
        if self.table is not None and not bool(torch.isfinite(self.table).all()):
            raise LayoutError("table: every value must be finite")


@torch.library.custom_op("bitwright::trellis_decode", mutates_args=())
def _decode(
    weight: Tensor, sizes: list[int], length: int, values: Tensor, step: int, window: int, scales: Tensor, start: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The rows from `start` on, as many as there are `scales`, on a CPU. `sizes`: bytes of a column's stream in each
    sequence of `length` rows; `values` `[2^window, V]`."""
    from quant.kernels.paths import decode

    columns, begin, stop = weight.numel() // sum(sizes), 0, start + len(scales)
    out, jobs = torch.empty((len(scales), columns), dtype=dtype), list[tuple[Tensor, int, int, int]]()
    for number, size in enumerate(sizes):
        first, last = max(start, number * length), min(stop, (number + 1) * length)
        if first < last:
            streams = weight[begin : begin + columns * size].view(columns, size)
            jobs.append((streams, first - number * length, first - start, last - start))
        begin += columns * size

    def run(job: tuple[Tensor, int, int, int]) -> None:
        streams, first, begin, end = job
        rows = out[begin:end] if dtype == torch.float32 else torch.empty((end - begin, columns))
        decode(streams.numpy(), values.numpy(), step, window, first, scales[begin:end].numpy(), rows.numpy())
        if dtype != torch.float32:
            out[begin:end] = rows

    workers = min(len(jobs), torch.get_num_threads())
    if workers > 1 and out.numel() >= MANY:
        list(pool(workers).map(run, jobs))
    else:
        for job in jobs:
            run(job)
    return out


@_decode.register_fake
def _(
    weight: Tensor, sizes: list[int], length: int, values: Tensor, step: int, window: int, scales: Tensor, start: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return scales.new_empty((len(scales), weight.numel() // sum(sizes)), dtype=dtype)


def _bytes(word: Tensor, places: tuple[int, ...], mask: int) -> Tensor:
    parts = ((word >> place) & mask for place in places)
    return sum(parts, start=torch.zeros_like(word)).float()
