"""Specs: the promise about storage, exact to the byte.

A spec says how one weight matrix `[out, in]` will lie on disk: which tensors, of which dtype and shape, and so how many
bits each weight costs with *everything* counted. Solvers read it to know their freedom, the dry run reads it to predict
the checkpoint's size, the loader reads it to know what a sound file must contain, and a test compares it with the bytes
of the files. Expert stacks `[experts, out, in]` are stored as the matrix `[experts * out, in]`: groups run along the
input, so rows never mix and a row range is an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from quant.kernels.binary import Binary as Binary
from quant.kernels.codebook import Codebook as Codebook
from quant.kernels.promise import DTYPES as DTYPES
from quant.kernels.promise import Around, Spec, SpecError, TensorSpec, check_whole


@dataclass(frozen=True)
class Uniform(Spec):
    """Uniform grid: `w = scale * (code - zero)`, one scale and zero per row and per group of `group_size` inputs.

    `bits`: 1-8. `group_size`: any positive number (the last group may be shorter), or -1 for the whole row.
    `symmetric`: no stored zero point; the zero is `2^(bits-1)`, and 0.5 at 1 bit (levels -scale/2, +scale/2). The scale
    may be negative, so the longer side of the grid can face either way. Asymmetric: a zero point of `bits` bits.
    `scale_dtype`: float16 or bfloat16. `activations`: bits of what the weight is multiplied by. 8: whoever multiplies
    rounds each token by its own scale and sums integers (`kernels/integer.py`); groups are then multiples of 32 inputs,
    as the int8 kernel takes them. 16: inputs are taken as they come.
    """

    layout: ClassVar[str] = "uniform"

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    activations: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        check_whole(self, "a uniform grid takes", bits=(1, 8))
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise SpecError(f"group_size is {self.group_size!r}; give a positive whole number, or -1 for whole rows")
        if self.group_size != -1 and self.group_size < 1:
            raise SpecError(f"group_size is {self.group_size}; give a positive number, or -1 for one group per row")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"symmetric is {self.symmetric!r}; give true or false")
        if self.scale_dtype not in ("float16", "bfloat16"):
            raise SpecError(f"scale_dtype is {self.scale_dtype!r}; give 'float16' or 'bfloat16'")
        if self.activations not in (8, 16) or isinstance(self.activations, bool):
            raise SpecError(f"activations is {self.activations!r}; give 8, or 16 to leave the inputs as they are")
        if self.activations == 8 and self.group_size != -1 and self.group_size % 32:
            raise SpecError(
                f"group_size is {self.group_size}; 8-bit activations take a multiple of 32, or -1 for whole rows"
            )

    def groups(self, columns: int) -> int:
        return math.ceil(columns / self.group_width(columns))

    def group_width(self, columns: int) -> int:
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = self.groups(columns)
        stored = {
            # one dimension, so that no float parameter has this shape: transformers without quant refuses it
            "weight": TensorSpec("uint8", (rows * math.ceil(columns * self.bits / 8),)),
            "scales": TensorSpec(self.scale_dtype, (rows, groups)),
        }
        if not self.symmetric:
            stored["zeros"] = TensorSpec("uint8", (rows, math.ceil(groups * self.bits / 8)))
        return stored


@dataclass(frozen=True)
class Trellis(Spec):
    """Bitshift trellis code (QTIP, arXiv 2406.11235, section 3): every weight is a function of the `window` bits of its
    column's stream that begin at its place, and the stream advances by `bits` bits per weight.

    Sequences run along the outputs, `length` rows each, and end where they began (tail-biting), so a column of
    `length` weights takes `length * bits` bits and every weight can be decoded alone. `bits`: 1-4. `window`: 8-16 bits,
    more is better and slower to find: the Viterbi search visits `2^window` states per value. `code`: how a window
    becomes a value, see `kernels/trellis.py`; of `hyb`, and of `mac` at 1 and 2 bits, it becomes two, and the stream
    advances by twice as many bits. `length`: a multiple of 32. `table_bits`: of `hyb`, whose table has `2^table_bits`
    pairs. Each row has a scale of 8 bits.
    """

    layout: ClassVar[str] = "trellis"

    bits: int = 2
    window: int = 13
    code: Literal["inst", "mac", "sum", "hyb"] = "mac"
    length: int = 256
    table_bits: int = 9

    def __post_init__(self) -> None:
        check_whole(self, "a trellis takes", bits=(1, 4), window=(8, 16), length=(32, 4096), table_bits=(4, 9))
        if self.length % 32:
            raise SpecError(f"length is {self.length}; a trellis takes a multiple of 32 rows")
        if self.code not in ("inst", "mac", "sum", "hyb"):
            raise SpecError(f"code is {self.code!r}; give 'inst', 'mac', 'sum' or 'hyb'")

    @property
    def unit(self) -> int:
        return self.length

    @property
    def vector(self) -> int:
        """Values of a state."""
        return 2 if self.code == "hyb" or (self.code == "mac" and self.bits <= 2) else 1

    @property
    def step(self) -> int:
        """Bits by which the stream advances from state to state."""
        return self.bits * self.vector

    def sequences(self, rows: int) -> list[tuple[int, int]]:
        """Length in rows, and in rows with padding, of each sequence: whole bytes, and a window does not overlap
        itself."""
        unit = 8 // math.gcd(8, self.bits)
        found = [min(self.length, rows - start) for start in range(0, rows, self.length)]
        return [(n, max(-n // unit * -unit, math.ceil(self.window / self.bits / unit) * unit)) for n in found]

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        sequences = self.sequences(rows)
        return {
            "weight": TensorSpec("uint8", (columns * sum(padded * self.bits // 8 for _, padded in sequences),)),
            "scales": TensorSpec("uint8", (rows,)),
            "peaks": TensorSpec("float16", (len(sequences),)),
            **({"table": TensorSpec("float16", (1 << self.table_bits, 2))} if self.code == "hyb" else {}),
        }


@dataclass(frozen=True)
class Rotated(Around):
    """`base` in another basis: `W = B^T Q A`, with `A` and `B` block Hadamard matrices with random signs over the
    inputs and outputs, or the identity (QuIP#, arXiv 2402.04396, section 3).

    `block`: the largest Hadamard block; each side takes the largest that divides it. `outputs`: whether the output side
    may be rotated. `measured`: solve in each basis, keep the one of least error and store which it was; otherwise the
    input side is rotated, and the output side too where it may be better.
    """

    layout: ClassVar[str] = "rotated"

    base: Spec = field(default_factory=Trellis)
    block: int = 128
    outputs: bool = False
    measured: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.base, WRAPPERS):
            raise SpecError(
                "a rotation goes around the codes alone: one is enough; a low-rank branch or smoothing goes around it"
            )
        check_whole(self, "a rotation's block is", block=(2, 2048))

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        stored = {
            **self.base.tensors(shape),
            "rotation": TensorSpec("uint8", (2,)),
            "input_signs": TensorSpec("uint8", (math.ceil(columns / 8),)),
        }
        if self.outputs:
            stored["output_signs"] = TensorSpec("uint8", (math.ceil(rows / 8),))
        return stored


@dataclass(frozen=True)
class LowRank(Around):
    """`base` and a low-rank branch that makes up for what it lost: `W = Q + B A`, `B` `[out, rank]`, `A` `[rank, in]`.

    `rank`: of the branch, 16 bits for each of its `rank (in + out)` values; a smaller matrix has a branch of its own
    rank. `weighted`: the branch that loses least on the calibration inputs (EoRA, arXiv 2410.21271); otherwise the one
    nearest to the lost weights themselves (LoRC, arXiv 2303.08302). `rounds`: how often the base is then solved again
    for what the branch leaves to it, and the branch after it; the best round is kept, each costs a solve. `anchor`: a
    component carries what the base loses along one token (`solvers/anchor.py`).
    """

    layout: ClassVar[str] = "lowrank"

    base: Spec = field(default_factory=Uniform)
    rank: int = 32
    weighted: bool = True
    rounds: int = 1
    anchor: bool = False
    factor_dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.base, LowRank | Smoothed):
            raise SpecError(
                "a low-rank branch beside a low-rank branch, or around smoothing; smoothing goes around one"
            )
        check_whole(self, "a low-rank branch takes", rank=(1, 4096), rounds=(0, 16))
        if not isinstance(self.weighted, bool) or not isinstance(self.anchor, bool):
            raise SpecError(f"weighted is {self.weighted!r}, anchor {self.anchor!r}; give true or false")
        if self.factor_dtype not in ("float16", "bfloat16"):
            raise SpecError(f"factor_dtype is {self.factor_dtype!r}; give 'float16' or 'bfloat16'")

    def width(self, shape: tuple[int, int]) -> int:
        """The rank of the branch of a weight of this shape."""
        return min(self.rank, *shape)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            **self.base.tensors(shape),
            "lora_a": TensorSpec(self.factor_dtype, (self.width(shape), columns)),
            "lora_b": TensorSpec(self.factor_dtype, (rows, self.width(shape))),
        }


@dataclass(frozen=True)
class Smoothed(Around):
    """`base` with each input multiplied by a factor of its own, and the weight's columns divided by it: `W = Q diag(m)`
    (SmoothQuant, arXiv 2211.10438; SVDQuant, arXiv 2411.05007, section 4.1). The channels of inputs to be rounded come
    nearer to each other, or important columns get more of a grid; the solver looks for the best factors among those of
    `quant/solvers/smoothing.py`, with `base` as it is, branch and rotation included.

    `points`: exponents tried of each kind; each costs a rounding to nearest, and the best a solve.
    """

    layout: ClassVar[str] = "smoothed"

    base: Spec = field(default_factory=Uniform)
    points: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.base, Smoothed):
            raise SpecError("smoothing around smoothing; one is enough")
        check_whole(self, "give", points=(1, 100))

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {**self.base.tensors(shape), "smooth": TensorSpec("float16", (shape[1],))}


def rounds_inputs(spec: Spec) -> bool:
    """Whether a weight of this spec rounds what it is multiplied by."""
    return isinstance(spec.core, Uniform) and spec.core.activations == 8


WRAPPERS = (Rotated, LowRank, Smoothed)
"""Specs around a `base`, outermost last."""
KINDS: dict[str, type[Spec]] = {kind.layout: kind for kind in (Uniform, Trellis, Codebook, Binary, *WRAPPERS)}


def spec_from_dict(data: dict[str, Any]) -> Spec:
    """The inverse of `Spec.to_dict`. Raises `SpecError` on an unknown layout or key."""
    if not isinstance(data, dict) or data.get("layout") not in list(KINDS):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpecError(f"layout of {data!r} is unknown; this version knows {', '.join(sorted(KINDS))}")
    fields = {key: value for key, value in data.items() if key != "layout"}
    if "base" in fields:
        fields["base"] = spec_from_dict(fields["base"])
    try:
        return KINDS[data["layout"]](**fields)
    except TypeError as error:
        raise SpecError(f"spec {data!r}: {error}") from None
