"""Which blocks the trellis kernel takes, and how K is shared, where nothing was tuned (`tune.py`)."""

from __future__ import annotations

from functools import cache

from quant.kernels.blocks import Config, even_splits
from quant.kernels.trellis_order import CHUNK, UNIT, chunks

INTEGER = ("mac", "sum")
"""Codes whose values are sums of bytes. Of 1, 2 and 4 tokens a product, these bytes are multiplied, as integers, with
two or four columns of a product to a token; of more they are added up first, for float16 products."""

ENOUGH = 12 * 16
"""Chunks for each program from which 16 warps are faster than 8."""

MOST = 16384
"""Columns of which a warp of such a code may sum 32 bits: `1020 * 127 * MOST < 2^31`."""


@cache
def choose(
    tokens: int, rows: int, columns: int, processors: int, code: str = "twin", warps: int = 0, resident: int = 0,
    clusters: bool = False,
) -> Config:  # fmt: skip
    """The configuration without a tuned one: 256 rows per program, and K split over `warps` in each and over as many
    programs as run side by side, `resident` on a multiprocessor; 0: what was fastest on an H200 (`README.md`). A warp
    adds what it has to what the others of its program have through shared memory; only programs leave parts in memory
    for the last of them to add. `clusters`: whether parts may be blocks of a program instead, see `clustered`. `code`:
    as `compiled_code` names it."""
    least = least_tokens(code)
    bm = next(size for size in (2, 4, 8, 16) if size >= least and (tokens <= size or size == 16 or code == "hyb"))
    integer, large = bm < 8, bm > 8 or (bm == 8 and least < 8)  # large: 8 warps have all registers
    programs = -(-rows // (16 * UNIT)) * -(-tokens // bm)
    splits = max(1, processors * (resident or (2 if large else 1 if integer else 6)) // programs)
    if clusters and tokens == 1 and integer and not warps:
        found = clustered(rows, chunks(columns), processors, code, splits)
        if found is not None:
            return found
    enough = bm == 2 and chunks(columns) >= ENOUGH * splits
    most = 16 if bm == 2 else 4 if large else 8 if integer or tokens == 1 else 4
    warps = min(most, warps or (16 if enough else 8 if integer or large else 2))
    if large:  # or the sums of parts took longer than the parts
        splits = min(splits, max(1, chunks(columns) // (4 * warps)))
    splits = max(splits, -(-columns // (MOST * warps)))
    return Config(bm, 16 * UNIT, warps, 1, even_splits(columns, splits, CHUNK * warps))


def clustered(rows: int, count: int, processors: int, code: str, splits: int) -> Config | None:
    """Of one token, with K split over the blocks of a cluster: as many multiprocessors as can be, of 256 rows or, of
    `twin`, 128. None where so few take part that `splits` programs are faster: they cost about as much time more as 20
    chunks of 256 rows take."""
    least, bns = least_tokens(code), (16 * UNIT, 8 * UNIT)[: 1 + (code == "twin")]
    taken = dict[Config, int]()
    for bn, blocks in ((bn, blocks) for bn in bns for blocks in (8, 4, 2, 1)):
        warps = 16 if code == "twin" and count >= ENOUGH * blocks else 8  # others have no registers for 16
        config, programs = Config(least, bn, warps, 1, blocks), -(-rows // bn)
        if programs <= processors and together(programs, blocks, processors) and busy(config, count):
            taken[config] = programs * blocks
    if not taken:
        return None
    best = max(taken, key=taken.__getitem__)
    more = count * -(-rows // (16 * UNIT)) / taken[best] - count / splits
    return best if best.splits > 1 and more <= 20 and alone(1, code, best, count) else None


def apart_of(config: Config) -> int:
    """Chunks that a warp takes at a time: two of a program of 128 rows."""
    return 16 * UNIT // config.bn


def turns_of(config: Config, count: int) -> int:
    """How often a warp takes a chunk, or two at a time, of `count`."""
    return -(-count // (config.splits * config.warps * apart_of(config)))


def busy(config: Config, count: int) -> bool:
    """Whether no part of K is without one of its `count` chunks."""
    part = turns_of(config, count) * config.warps * apart_of(config)
    return (config.splits - 1) * part < count


def together(programs: int, blocks: int, processors: int) -> bool:
    """Whether so many clusters run side by side: their blocks are neighbours, of which a few are left over where they
    are more than two (of 132 multiprocessors 30 clusters of 4)."""
    return blocks == 1 or programs * blocks <= processors * (1.0 if blocks == 2 else 0.9)


def blocks_of(config: Config, tokens: int, rows: int, code: str, processors: int, clusters: bool) -> int:
    """Blocks of a program, each with a part of K: all parts, where there are `clusters` and enough of them."""
    fits = config.splits in (2, 4, 8) and tokens == 1 and config.bm == least_tokens(code) < 8
    fits = fits and together(-(-rows // config.bn), config.splits, processors)
    return config.splits if clusters and fits else 1


def least_tokens(code: str) -> int:
    """Tokens of one product of a code, as `compiled_code` names it: a program takes no fewer."""
    return 2 if code == "twin" else 4 if code in INTEGER else 8


def compiled_code(code: str, bits: int, tokens: int = 1) -> str:
    """What the kernels call a code of a product of so many tokens: `mac` is `twin` where a state has two values, and
    bytes that are added up are `_halves`."""
    name = "twin" if code == "mac" and bits <= 2 else code
    return name + "_halves" if tokens >= 8 and code in INTEGER else name


def candidates(tokens: int, rows: int, columns: int, processors: int, code: str = "twin") -> list[Config]:
    """Configurations worth timing: how K is split."""
    found = [
        choose(tokens, rows, columns, processors, code, warps, resident)
        for warps, most in ((1, 16), (2, 8), (4, 4), (8, 2), (16, 1))
        for resident in range(max(1, most // 2), most + 1, max(1, most // 4))
    ]
    count = chunks(columns)
    if tokens == 1 and code == "twin":
        made = [Config(2, bn, warps, 1, blocks) for bn in (256, 128) for warps in (4, 8, 16) for blocks in (1, 2, 4, 8)]
        found += [config for config in made if busy(config, count) and alone(1, code, config, count)]
    return list(dict.fromkeys(found))


def alone(tokens: int, code: str, config: Config, count: int) -> bool:
    """Whether each warp takes its `x` as a whole: one token of an integer code, and of `count` chunks no more than 32
    for a warp, 512 for a block. `code`: as `compiled_code` names it."""
    apart = apart_of(config)
    steps = -(-apart * turns_of(config, count) // 8)
    known = config.bm == least_tokens(code) < 8 and (apart == 1 or code == "twin")
    return tokens == 1 and known and steps <= 4 and steps * config.warps <= 64


def turns(tokens: int, code: str, config: Config, block: int, count: int) -> bool:
    """Whether the product rotates `x` itself: blocks of a power of two from 8 to 256, whole ones for each warp, which
    takes its `x` as a whole."""
    columns = turns_of(config, count) * apart_of(config) * CHUNK
    return block in (8, 16, 32, 64, 128, 256) and columns % block == 0 and alone(tokens, code, config, count)
