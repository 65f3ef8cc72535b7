"""Compiles a Triton kernel for GPUs that are not here and reads what the assembler says of it.

No driver is needed: ptxas and nvdisasm come with Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

OLD = version("triton").startswith("3.6.")
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, KiB, by compute capability (CUDA C++ programming guide, table 'Technical
specifications per compute capability')."""


@dataclass(frozen=True)
class Compiled:
    """`registers` per thread; `spilled` bytes of local memory; `shared` bytes that a launch asks for, `static` ones
    that the kernel's own arrays take, with what the driver keeps for itself; `ops`: SASS mnemonics, counted."""

    capability: int
    registers: int
    spilled: int
    shared: int
    static: int
    ops: Counter[str]
    ttgir: str

    def fits(self, spilled: int = 0) -> bool:
        return self.spilled <= spilled and self.shared + self.static <= SHARED_LIMIT[self.capability] * 1024


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int,
    fusion: bool = True, blocks: int = 1,
) -> Compiled:  # fmt: skip
    """`types`: Triton's type of each run-time argument ("*fp16", "i32"); pointers and the sizes N, K and stride count
    as divisible by 16, as they are for every real model. `blocks` of a program: a cluster."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and (types[name].startswith("*") or name in ("N", "K", "stride"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_ctas": blocks, "num_stages": stages, "enable_fp_fusion": fusion}
    made = compile_triton(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read(capability, made.asm["cubin"], made.asm["ttgir"], made.metadata.shared)


def read(capability: int, cubin: bytes, ttgir: str, shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(file))
        sass = _run("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found is not None, usage
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE))
    spilled = sum(count for op, count in ops.items() if op.startswith(("LDL", "STL")))
    return Compiled(capability, int(found[1]), max(spilled, int(found[2])), shared, int(found[3]), ops, ttgir)


def _run(tool: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [str(folder / tool), *arguments], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
