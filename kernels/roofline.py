"""How fast a product can be at best: the bytes that must move, the operations that must be done, and the time of each.

`x[M, K] @ W[N, K]^T` reads every input once and writes every output once, so with a memory that copies `B` bytes per
second (read and written bytes both counted) and a processor that multiplies at `R` flop per second,

    t >= max(bytes / B, 2 M N K / R)                  (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009)

    bytes = T N 32 b                packed codes: T = ceil(K / 256) tiles of 256 columns of b bits (`order.py`)
          + G N (2 + 1)             a scale of 2 bytes per group of each row, and a zero point of 1 (asymmetric only)
          + 2 (M K + M N)           activations and outputs of 16 bits

of a uniform weight; of a trellis (`trellis_order.py`) its first two lines are

    bytes = ceil(K / 32) U 64 b     packed codes: U units of 16 rows, N / 16 where sequences are whole
          + N + 2 S                 a scale of a byte per row, and one of 2 bytes for each of S sequences

of a codebook (`codebook_order.py`)

    bytes = 4 words                 packed indices: 16 vector rows by 128 columns to a tile, of each group
          + 2 C                     C values in tables, vectors padded to 2, 4, 8 or 16
          + 4 G (F + K)             F finer columns of each of G groups, and each column's place among them
          + N + 2 G                 scales as of a trellis

and a plain 16-bit weight has `2 N K` in place of these. While tokens are few the first term decides: the time is that
of the weight's bytes, and b bits in groups of g are at most `16 / (b + 24 / g)` times as fast as 16 bits (3.8 for 4
bits in groups of 128, 5.0 for 3, 7.3 for 2). The terms meet at about `M = (R / B) (b + 24 / g) / 16` tokens; from there
on packing saves memory and no time. `B` and `R` are measured where the time is (`benchmark.py`), never looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.kernels import codebook_order
from quant.kernels.codebook import codebook_for
from quant.kernels.order import TILE, tiles
from quant.kernels.spec import Codebook, Trellis, Uniform
from quant.kernels.trellis_order import chunks, units


@dataclass(frozen=True)
class Work:
    """Of one product: bytes of `weight` (scales and zeros included), `inputs` and `outputs`; `flops`, a multiplication
    and an addition counted as two."""

    weight: int
    inputs: int
    outputs: int
    flops: int

    @property
    def nbytes(self) -> int:
        return self.weight + self.inputs + self.outputs

    def limit(self, bandwidth: float, rate: float) -> float:
        """Seconds that it takes at least. `bandwidth`: bytes/s; `rate`: flop/s."""
        return max(self.nbytes / bandwidth, self.flops / rate)


def work(tokens: int, rows: int, columns: int, spec: Uniform | Trellis | Codebook | None, itemsize: int = 2) -> Work:
    """Of `x` `[tokens, columns]` times a weight `[rows, columns]`, `itemsize` bytes per activation and output. `spec`:
    how the weight is packed, in kernel order; None for a plain one of `itemsize` bytes."""
    if spec is None:
        weight = rows * columns * itemsize
    elif isinstance(spec, Trellis):
        weight = chunks(columns) * units(rows, spec.length)[1] * 64 * spec.bits + rows + 2 * -(-rows // spec.length)
    elif isinstance(spec, Codebook):
        spec = codebook_for(spec, (rows, columns))
        groups, finer, width = -(-rows // spec.rows), spec.finer(columns), codebook_order.width(spec.length)
        weight = 4 * sum(codebook_order.words(spec, (rows, columns)))
        weight += sum(2 * groups * width << bits for bits in codebook_order.bits_of(spec))
        weight += 4 * groups * (finer + columns) * (0 < finer < columns) + rows + 2 * groups
    else:
        weight = tiles(columns) * TILE // 8 * spec.bits * rows
        weight += spec.groups(columns) * rows * (2 if spec.symmetric else 3)
    return Work(weight, tokens * columns * itemsize, tokens * rows * itemsize, 2 * tokens * rows * columns)
