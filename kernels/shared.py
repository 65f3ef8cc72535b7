"""Shared memory by its addresses: Triton functions for what its own language has no words for.

A kernel that looks random places up wants its table in shared memory, in an order that it knows. `reserved` declares an
array in the PTX of the kernel (static shared memory, which a launch counts beside what Triton asks for: together at
most 48 KiB need no leave) and gives its address; `put`, `get` and `look_up` take addresses in bytes. All of them are
marked as what has effects, so none is moved across a barrier, left out or made twice; call `reserved` once in a kernel.
The interpreter has no such memory: kernels read the table itself there.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# Triton's language has no types that pyright could follow
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reserved(lanes):
    """The address uint32 of 32 KiB that a program has for itself, the same in each of the `lanes`."""
    return tl.inline_asm_elementwise(
        "{.shared .align 16 .b8 held[32768]; mov.u32 $0, held;}", "=r,r", [lanes], dtype=tl.uint32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def put(at, words):
    """Four 32-bit words at addresses that are multiples of 16."""
    tl.inline_asm_elementwise(
        "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,r,r,r,r",
        [at, words[0], words[1], words[2], words[3]], dtype=tl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def get(at):
    """The float32 at each address."""
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [at], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def look_up(table, word, BYTE: tl.constexpr):
    """The entry, two words, that byte BYTE of a word counts in a table whose entries are 128 bytes apart. The byte is
    taken out in one pipe and multiplied in the other."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 at; prmt.b32 at, $2, 0, $4; mad.lo.u32 at, at, 128, $3; ld.shared.v2.b32 {$0, $1}, [at];}",
        "=r,=r,r,r,r", [word, table, 0x4440 + BYTE], dtype=(tl.uint32, tl.uint32), is_pure=False, pack=1,
    )  # fmt: skip
