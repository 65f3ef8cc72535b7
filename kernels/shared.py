"""Shared memory by its addresses: Triton functions for what its own language has no words for.

A kernel that looks random places up wants its table in shared memory, in an order that it knows. `reserved` declares an
array in the PTX of the kernel (static shared memory, which a launch counts beside what Triton asks for: together at
most 48 KiB need no leave) and gives its address; `put`, `get` and `look_up` take addresses in bytes. All of them are
marked as what has effects, so none is moved across a barrier, left out or made twice; a kernel calls `reserved` once.

`entries` and `filled` lay a table of 256 entries of 8 bytes there 16 times, side by side: entry `e` of copy `c` at
`128 e + 8 c`. A lane that reads copy `lane % 16` wants two banks that no other lane of its half of the warp wants,
whatever it looks up. `added` sums up the products (`warp.py`) of a program's warps, through the same memory. The
interpreter has none: kernels read the table itself there.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.warp import load_inputs


@triton.constexpr_function
def _declared(size: int) -> str:
    return f"{{.shared .align 16 .b8 held[{size}]; mov.u32 $0, held;}}"


@triton.jit
def reserved(lanes, SIZE: tl.constexpr):
    """The address uint32 of SIZE bytes that a program has for itself, the same in each of the `lanes`."""
    return tl.inline_asm_elementwise(_declared(SIZE), "=r,r", [lanes], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def put(at, words):
    """Four 32-bit words at addresses that are multiples of 16."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,r,r,r,r",
        [at, words[0], words[1], words[2], words[3]], dtype=tl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_one(at, number):
    """A float32 at each address, a multiple of 4."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at, number], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def put_some(at, number, here):
    """`put_one` where `here`."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.b32 $0, 0;}", "=r,r,f,r",
        [at, number, here.to(tl.int32)], dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def together(lanes):
    """What a warp's lanes have put is there for all of them from here on; other warps do not wait."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [lanes], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def get(at):
    """The float32 at each address."""
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def added_up(at, STEP: tl.constexpr, COUNT: tl.constexpr):
    """The sum of COUNT float32, STEP bytes apart, in their order."""
    total = get(at)
    for i in tl.static_range(1, COUNT):
        total += get(at + i * STEP)
    return total


@triton.jit
def get_four(at):
    """The four words uint32 at each address, a multiple of 16."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", [at],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def look_up(table, word, BYTE: tl.constexpr):
    """The entry, two words, that byte BYTE of a word counts in a table whose entries are 128 bytes apart. The byte is
    taken out in one pipe and multiplied in the other."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 at; prmt.b32 at, $2, 0, $4; mad.lo.u32 at, at, 128, $3; ld.shared.v2.b32 {$0, $1}, [at];}",
        "=r,=r,r,r,r", [word, table, 0x4440 + BYTE], dtype=(tl.uint32, tl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def entries(codebook, local, LANES: tl.constexpr):
    """Of a table of 256 entries of two words, which are to lie in 16 copies: what each lane of a block is to put
    there."""
    held = ()
    for i in tl.static_range(2048 // LANES):
        held = held + (load_inputs(codebook + (i * LANES + local) // 8 * 4, local, 2, True, True),)
    return held


@triton.jit
def filled(start, held, local, LANES: tl.constexpr):
    """Puts the copies there, 32768 bytes from address `start` on."""
    for i in tl.static_range(2048 // LANES):
        put(start + ((i * LANES + local) * 16).to(tl.uint32), held[i] + held[i])
    tl.debug_barrier()


@triton.jit
def _beside(acc, back, AT: tl.constexpr):
    """A tile's accumulators, the warps' added, as `[4 tokens, 32 rows]`; for the interpreter."""
    four = tl.join(tl.join(acc[AT][0], acc[AT][2]), tl.join(acc[AT][1], acc[AT][3]))
    four *= back[:, None, None]
    four = tl.sum(tl.reshape(four, (back.shape[0] // 32, 8, 4, 4)), 0)
    return tl.reshape(tl.permute(four, (1, 0, 2)), (4, 32))


@triton.jit
def added(
    acc, back, start, local, PART: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    COUNT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The sums over all warps of a part's products, times `back`: COUNT tensors, number `i` of which has of
    `[4 tokens, 32 TILES rows]` the places from `32 WARPS i` on. Of a block, whose lanes are `local`; the interpreter
    adds those of all blocks of the program."""
    ROWS: tl.constexpr = 32 * TILES
    sums = ()
    if NATIVE:
        PITCH: tl.constexpr = ROWS + 8  # else the four tokens of a lane would want the same banks
        g, t, warp = local // 4 % 8, local % 4, local // 32
        tl.debug_barrier()
        for tile in tl.static_range(TILES):
            mine = ((warp * 4 + t) * PITCH + 32 * tile + 4 * g) * 4
            four = acc[tile * PARTS + PART]
            put(start + mine.to(tl.uint32), (four[0] * back, four[1] * back, four[2] * back, four[3] * back))
        tl.debug_barrier()
        for i in tl.static_range(COUNT):
            place = i * 32 * WARPS + local
            at = start + ((place // ROWS * PITCH + place % ROWS) * 4).to(tl.uint32)
            sums = sums + (added_up(at, 16 * PITCH, WARPS),)
    else:
        whole = tl.join(_beside(acc, back, PART), _beside(acc, back, PARTS + PART))
        if TILES == 4:
            rest = tl.join(_beside(acc, back, 2 * PARTS + PART), _beside(acc, back, 3 * PARTS + PART))
            whole = tl.permute(tl.join(whole, rest), (0, 1, 3, 2))
        whole = tl.reshape(tl.permute(tl.reshape(whole, (4, 32, TILES)), (0, 2, 1)), (4 * ROWS,))
        for i in tl.static_range(COUNT):
            sums = sums + (tl.gather(whole, i * 32 * WARPS + local, 0),)
    return sums
