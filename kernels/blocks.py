"""Which block sizes the uniform kernels take, and how K is shared, where nothing was tuned (`tune.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from quant.kernels.integer import span
from quant.kernels.order import TILE


@dataclass(frozen=True)
class Config:
    """Block sizes of one launch; `splits`: programs that share K."""

    bm: int
    bn: int
    warps: int
    stages: int
    splits: int


def choose(
    tokens: int, rows: int, columns: int, processors: int, bits: int = 4, narrow: bool = False, skinny: bool = True
) -> Config:
    """The configuration without a tuned one. `skinny`: whether `skinny.py`'s kernel takes the weight; it is the faster
    one for any number of tokens. Else as many rows per warp as its registers hold, and K split until every
    multiprocessor has about 8 warps. `narrow`: at most 32 rows from 32 tokens on. Triton 3.6 compiles no more for
    compute capability 10.0 ("Illegal shared layout"); Triton 3.9 does."""
    if skinny:
        return choose_skinny(tokens, rows, columns, processors, bits)
    bm = next((size for size in (8, 16, 32) if tokens <= size), 64)
    wide = 64 if bits <= 2 else 32
    many = {32: (32, 2), 64: (32, 4)} if narrow else {32: (64, 4), 64: (64, 4 if bits <= 4 else 8)}
    bn, warps = ({8: (wide, 1), 16: (32, 1)} | many)[bm]
    programs = -(-rows // bn) * -(-tokens // bm)
    return Config(bm, bn, warps, 1, even_splits(columns, min(16, processors * 8 // (programs * warps))))


def choose_skinny(
    tokens: int, rows: int, columns: int, processors: int, bits: int, bn: int = 0, warps: int = 0
) -> Config:
    """Of `skinny.py`'s kernel, with `bn` rows per program and K split until a multiprocessor has about so many `warps`;
    0: what was fastest on an H200 (`README.md`). A split has two steps at least."""
    bm = next((size for size in (4, 8) if tokens <= size), 16)
    bn = bn or (64 if bm == 4 and bits <= 3 and rows * columns >= 1 << 27 else 32)
    best = (24 if bm < 16 else 16) if 4 <= bits < 8 else 16 if bm < 16 else 12
    programs, step = -(-rows // bn) * -(-tokens // bm), step_columns(bits)
    wanted = min(32, processors * (warps or best) // programs, columns // (2 * step))
    return Config(bm, bn, 1, 1, even_splits(columns, wanted, step))


def is_skinny(config: Config) -> bool:
    """Whether a configuration is one of `skinny.py`'s kernel."""
    return config.bm <= 16 and config.warps == 1 and config.bn in (32, 64)


def takes_skinny(rows: int, width: int, columns: int) -> bool:
    """Whether `skinny.py`'s kernel multiplies by a weight in groups of `width`."""
    return rows % 8 == 0 and rows >= 8 and span(width, columns) > 0


def step_columns(bits: int) -> int:
    """Columns that `skinny.py`'s kernel takes at once."""
    return TILE // 2 if bits >= 4 else TILE


def even_splits(columns: int, wanted: int, tile: int = TILE) -> int:
    """About so many programs that share K, none of them without a tile."""
    count = -(-columns // tile)
    return -(-count // -(-count // max(1, min(wanted, count))))
