"""Clusters: blocks of a program that reach into each other's shared memory (compute capability 9.0 and more).

Triton makes a program of CTAS blocks a cluster (`num_ctas`), and of a tensor of `32 WARPS CTAS` elements one for each
thread: the first `32 WARPS` are those of block 0. Each block opens a barrier that waits for bytes; what another block
puts into its memory counts there as it comes (PTX ISA, `st.async`), so that sums of blocks need neither a fence nor a
counter. The interpreter has no blocks.

Triton 3.6 plans layouts of clusters from what is stored, step by step and no more than 10000; a kernel as large as
these has to store through `leave_number`, which it does not see, and once through `planned`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.shared import added_up, reserved


@triton.jit
def own_part(lanes, WARPS: tl.constexpr, CTAS: tl.constexpr):
    """Which part of K is a lane's block's, and which lane of it this one is."""
    if CTAS > 1:
        return lanes // (32 * WARPS), lanes % (32 * WARPS)
    else:
        return tl.program_id(1), lanes


@triton.jit
def _opened(barrier, local, BYTES: tl.constexpr):
    """Makes a barrier at an address of a block's memory, a multiple of 8, that waits for BYTES, and tells the other
    blocks."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.eq.b32 p, $2, 0; @p mbarrier.init.shared::cta.b64 [$1], 1; "
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $3; fence.mbarrier_init.release.cluster; "
        "barrier.cluster.arrive.relaxed.aligned; mov.b32 $0, 0;}", "=r,r,r,r", [barrier, local, BYTES],
        dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def room(lanes, local, HELD: tl.constexpr, SUMS: tl.constexpr, CTAS: tl.constexpr, NATIVE: tl.constexpr):
    """The address of HELD bytes that each block has for itself; of several blocks also of SUMS bytes for `exchanged`
    behind them and the barrier, which is opened."""
    start = lanes.to(tl.uint32)
    if NATIVE:
        start = reserved(lanes, HELD + (SUMS + 8 if CTAS > 1 else 0))
        if CTAS > 1:
            _opened(start + (HELD + SUMS), local, SUMS)
    return start


@triton.jit
def _all_opened(lanes):
    """The barriers of all blocks are there: their memory may be written to. Once after `_opened`."""
    tl.inline_asm_elementwise(
        "barrier.cluster.wait.aligned; mov.b32 $0, 0;", "=r,r", [lanes], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def _put_there(at, barrier, block, number, here):
    """A float32 at an address of a block's own memory, in that of another block; nothing where not `here`."""
    tl.inline_asm_elementwise(
        "{.reg .b32 there, bar; .reg .pred p; setp.ne.b32 p, $5, 0; @p mapa.shared::cluster.u32 there, $1, $3; "
        "@p mapa.shared::cluster.u32 bar, $2, $3; "
        "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], $4, [bar]; mov.b32 $0, 0;}",
        "=r,r,r,r,r,r", [at, barrier, block, number.to(tl.int32, bitcast=True), here.to(tl.int32)], dtype=tl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _all_come(barrier):
    """Waits until all bytes of a block's barrier are there."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], 0; @!p bra again; "
        "mov.b32 $0, 0;}",
        "=r,r", [barrier], dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def exchanged(sums, start, mine, local, LANES: tl.constexpr, PLACES: tl.constexpr, CTAS: tl.constexpr):
    """Of a block's sums, of places `local`, `LANES + local`, ..., those of all blocks added, in their order: of the
    `PLACES / CTAS` places that block `mine` keeps, a tensor for LANES of them. `start`: the address of memory for all
    places, behind which the block's barrier lies. Once after `room`."""
    OWN: tl.constexpr = PLACES // CTAS
    _all_opened(local)
    barrier = start + PLACES * 4
    for i in tl.static_range(len(sums)):
        place = i * LANES + local
        there = start + ((mine * OWN + place % OWN) * 4).to(tl.uint32)
        _put_there(there, barrier, place // OWN, sums[i], place < PLACES)
    _all_come(barrier)
    made = ()
    for i in tl.static_range(-(-OWN // LANES)):
        made = made + (added_up(start + ((i * LANES + local) % OWN * 4).to(tl.uint32), OWN * 4, CTAS),)
    return made


@triton.jit
def _store_half(at, number, here):
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0;}", "=r,l,h,r",
        [at.to(tl.int64), number.to(tl.int16, bitcast=True), here.to(tl.int32)], dtype=tl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def leave_number(at, number, here, CTAS: tl.constexpr):
    """Stores numbers at each pointer of 16-bit floats, where `here`."""
    number = number.to(at.dtype.element_ty)
    if CTAS > 1:
        _store_half(at, number, here)
    else:
        tl.store(at, number, mask=here)


@triton.jit
def planned(at, M):
    """A store of a number for Triton to see, which is never done: there are `M` tokens."""
    if M < 0:
        tl.store(at, 0)
