"""A warp's own arithmetic: Triton functions of tensors of one element for each lane, 32 in a program of one warp.

Which thread holds which part of a tensor core's operands is written down here (PTX ISA, mma.m16n8k16 and mma.m16n8k32)
and not left to the compiler, whose choice differs between versions: the same trellis product took 4.7 instructions per
weight with Triton 3.9 and 8.0 with 3.6, half of them to carry values between lanes.

Lane `l` is `g = l // 4`, `t = l % 4`. Of a product `C[16, 8] += A[16, k] B[k, 8]` of 16-bit numbers, k = 16, it holds

    a0 A[g, 2t..]   a1 A[g + 8, 2t..]   a2 A[g, 2t + 8..]   a3 A[g + 8, 2t + 8..]      two columns in a word each
    b0 B[2t.., g]   b1 B[2t + 8.., g]                                                  two rows in a word each
    c0 C[g, 2t]     c1 C[g, 2t + 1]     c2 C[g + 8, 2t]     c3 C[g + 8, 2t + 1]

and of bytes, k = 32, `4t` and `4t + 16` in place of `2t` and `2t + 8`, four in a word. Under the interpreter (NATIVE
is false), which has no assembler, the same is done with Triton's own operations.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: RET505, RUF005
# Triton's language has no types that pyright could follow, and its branches on constants are chosen when it compiles
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _loading(count: int, how: str) -> str:
    """The instruction that loads `count` words from the address that comes after them; `how`: its qualifiers."""
    if count == 1:
        return f"ld.global{how}.b32 $0, [$1];"
    return f"ld.global{how}.v{count}.b32 {{{', '.join(f'${i}' for i in range(count))}}}, [${count}];"


@triton.constexpr_function
def _loading_some(count: int) -> str:
    """The same where the operand after the address is not 0; else zeros."""
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    return f"{{.reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {zeros} @p {_loading(count, '')}}}"


@triton.jit
def read_words(at, COUNT: tl.constexpr, HOW: tl.constexpr, PURE: tl.constexpr = True):
    """COUNT words uint32 (1, 2 or 4) from each lane's pointer; HOW: qualifiers of the instruction."""
    return tl.inline_asm_elementwise(
        _loading(COUNT, HOW), "=r," * COUNT + "l", [at.to(tl.int64)], dtype=(tl.uint32,) * COUNT, is_pure=PURE, pack=1
    )


@triton.jit
def load_words(at, COUNT: tl.constexpr, TWICE: tl.constexpr, NATIVE: tl.constexpr, NOW: tl.constexpr = False):
    """COUNT words uint32 (1, 2 or 4) from each lane's pointer `at` to int32, aligned to as many. TWICE: they are read
    once more soon; else they go past the first-level cache. NOW: four words, and before the next barrier."""
    if NATIVE and NOW:
        return read_words(at, COUNT, ".L1::evict_first", False)
    elif NATIVE:
        return read_words(at, COUNT, ".nc.L1::evict_first" if TWICE else ".nc.L1::no_allocate")
    else:
        words = ()
        for i in tl.static_range(COUNT):
            words = words + (tl.load(at + i).to(tl.uint32, bitcast=True),)
        return words


@triton.jit
def load_inputs(at, here, COUNT: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr):
    """COUNT words (2 or 4) of two activations each from pointers `at` to 16-bit numbers, aligned to as many; zero where
    not `here`, which EVEN says is everywhere."""
    if NATIVE:
        if EVEN:
            return read_words(at, COUNT, "")
        else:
            return tl.inline_asm_elementwise(
                _loading_some(COUNT), "=&r," * COUNT + "l,r", [at.to(tl.int64), here.to(tl.int32)],
                dtype=(tl.uint32,) * COUNT, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        words = ()
        for i in tl.static_range(COUNT):
            low = tl.load(at + 2 * i, mask=here, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
            high = tl.load(at + 2 * i + 1, mask=here, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
            words = words + (low | high << 16,)
        return words


@triton.jit
def fetch(at):
    """Asks for the line of each lane's pointer: it is on its way to the second-level cache. Nothing waits for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.jit
def waited(lanes):
    """Zero, int32, once the kernel before this one is over and what it stored is there; the kernel after this one may
    begin from here on. What an address is made with this cannot be read before."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r,r", [lanes], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def shuffled(number, lane, NATIVE: tl.constexpr):
    """The float32 or int32 of another lane."""
    if not NATIVE:
        return tl.gather(number, lane, 0)
    else:
        REGISTERS: tl.constexpr = "=f,f,r" if number.dtype == tl.float32 else "=r,r,r"
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", REGISTERS, [number, lane], dtype=number.dtype,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def largest_of(number, lanes, ROUNDS: tl.constexpr, NATIVE: tl.constexpr):
    """The largest of `2^ROUNDS` lanes in a row, in each of them; NaN if there is one."""
    for step in tl.static_range(ROUNDS):
        other = shuffled(number, lanes ^ 1 << step, NATIVE)
        number = tl.maximum(number, other, propagate_nan=tl.PropagateNan.ALL)
    return number


@triton.jit
def permuted(low, high, select, NATIVE: tl.constexpr):
    """Four of the eight bytes of two words, each by a digit of `select`: 0 to 3 of `low`, 4 to 7 of `high`."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, select], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        made = low & 0
        for i in tl.static_range(4):
            byte = select >> 4 * i & 15
            made = made | (tl.where(byte < 4, low, high) >> (byte & 3) * 8 & 255) << 8 * i
        return made


@triton.jit
def byte_sum(word, TIMES: tl.constexpr, more, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """`more` and the sum of the bytes of a word, each times one of TIMES, which have signs; SIGNED: the word's have
    one. int32."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a." + ("s32" if SIGNED else "u32") + ".s32 $0, $1, $2, $3;", "=r,r,r,r", [word, TIMES, more],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = tl.zeros_like(word).to(tl.int32) + more
        for i in tl.static_range(4):
            TIME: tl.constexpr = ((TIMES >> 8 * i & 255) ^ 128) - 128
            byte = (word >> 8 * i & 255).to(tl.int32)
            total += ((byte ^ 128) - 128 if SIGNED else byte) * TIME
        return total


@triton.jit
def masked(word, mask, other, NATIVE: tl.constexpr):
    """`word & mask | other`, one instruction wherever it stands."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, other], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return word & mask | other


@triton.jit
def numbers(word, KIND: tl.constexpr):
    """The two halves of words as float32."""
    if KIND == "bf16":
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def joined(low, high, NATIVE: tl.constexpr):
    """Two float32 as a word of two float16."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        low, high = low.to(tl.float16).to(tl.uint16, bitcast=True), high.to(tl.float16).to(tl.uint16, bitcast=True)
        return low.to(tl.uint32) | high.to(tl.uint32) << 16


@triton.jit
def halved(word, TIMES: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Both halves times 2^-TIMES."""
    if TIMES == 0:
        return word
    elif NATIVE:
        if KIND == "bf16":  # mul.bf16x2 needs compute capability 9.0
            FACTOR: tl.constexpr = 0x3F803F80 - TIMES * 0x00800080
            return tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [word, FACTOR, 0x80008000], dtype=tl.uint32, is_pure=True,
                pack=1,
            )  # fmt: skip
        else:
            FACTOR: tl.constexpr = 0x3C003C00 - TIMES * 0x04000400
            return tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [word, FACTOR], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        low, high = numbers(word, KIND)
        FACTOR: tl.constexpr = 1.0 / (1 << TIMES)
        if KIND == "bf16":
            return (low * FACTOR).to(tl.uint32, bitcast=True) >> 16 | (high * FACTOR).to(tl.uint32, bitcast=True)
        else:
            low = (low * FACTOR).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
            return low | (high * FACTOR).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def _parts(word, KIND: tl.constexpr, SIGNED: tl.constexpr):
    """The numbers in words as float32, in a last dimension: two halves, or four bytes."""
    if KIND == "int8":
        even, odd = tl.join(word & 255, word >> 16 & 255), tl.join(word >> 8 & 255, word >> 24)
        found = tl.join(even, odd).to(tl.int32)
        if SIGNED:
            found = (found ^ 128) - 128
        return found.to(tl.float32)
    else:
        low, high = numbers(word, KIND)
        return tl.join(low, high)


@triton.jit
def _multiplied(a0, a1, a2, a3, b0, b1, c, KIND: tl.constexpr):
    """`product` with Triton's own operations."""
    K: tl.constexpr = 32 if KIND == "int8" else 16
    LANES: tl.constexpr = a0.shape[0]
    W: tl.constexpr = LANES // 32  # warps
    a = tl.reshape(tl.join(tl.join(a0, a1), tl.join(a2, a3)), (W, 8, 4, 2, 2))  # g, t, lower rows, later columns
    a = _parts(a, KIND, False)
    b = _parts(tl.reshape(tl.join(b0, b1), (W, 8, 4, 2)), KIND, True)
    if KIND == "int8":
        a = tl.reshape(tl.permute(a, (0, 3, 1, 4, 2, 5, 6)), (W, 16, K))
        b = tl.reshape(tl.permute(b, (0, 3, 2, 4, 5, 1)), (W, K, 8))
    else:
        a = tl.reshape(tl.permute(a, (0, 3, 1, 4, 2, 5)), (W, 16, K))
        b = tl.reshape(tl.permute(b, (0, 3, 2, 4, 1)), (W, K, 8))
    made = tl.dot(a, b, input_precision="ieee")
    made = tl.permute(tl.reshape(made, (W, 2, 8, 4, 2)), (0, 2, 3, 4, 1))  # g, t, second column, lower rows
    upper, lower = tl.split(made)
    even, odd = tl.split(upper)
    even_lower, odd_lower = tl.split(lower)
    SUM: tl.constexpr = c[0].dtype
    first = c[0] + tl.reshape(even, (LANES,)).to(SUM), c[1] + tl.reshape(odd, (LANES,)).to(SUM)
    return first + (c[2] + tl.reshape(even_lower, (LANES,)).to(SUM), c[3] + tl.reshape(odd_lower, (LANES,)).to(SUM))


@triton.constexpr_function
def _multiplying(kind: str) -> str:
    """The tensor core's instruction for numbers of a kind."""
    types = {"fp16": "k16.row.col.f32.f16.f16.f32", "bf16": "k16.row.col.f32.bf16.bf16.f32"}
    return "mma.sync.aligned.m16n8" + {**types, "int8": "k32.row.col.s32.u8.s8.s32"}[kind]


@triton.jit
def product(a0, a1, a2, a3, b0, b1, c, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """`c` (four accumulators) and a product of `KIND`: "fp16" or "bf16" with float32 accumulators; "int8": bytes
    without a sign times bytes with one, int32."""
    if NATIVE:
        SUM: tl.constexpr = "r" if KIND == "int8" else "f"
        return tl.inline_asm_elementwise(
            _multiplying(KIND) + " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            ("=" + SUM + ",") * 4 + "r,r,r,r,r,r" + ("," + SUM) * 4,
            [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]], dtype=(c[0].dtype,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _multiplied(a0, a1, a2, a3, b0, b1, c, KIND)


@triton.jit
def nothing(COUNT: tl.constexpr, INTEGER: tl.constexpr, LANES: tl.constexpr = 32):
    """COUNT times four accumulators at zero, int32 or float32."""
    zero = tl.zeros((LANES,), tl.int32 if INTEGER else tl.float32)
    return ((zero, zero, zero, zero),) * COUNT
