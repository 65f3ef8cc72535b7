"""Codes to bytes and back: golden bytes, the definition bit by bit, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.kernels.packing import pack, padding_is_zero, row_bytes, unpack

BITS = range(1, 9)
# the codes 1, 2, ..., 9 modulo 2^bits
GOLDEN = {
    1: "5501",
    2: "393901",
    3: "d1581f01",
    4: "2143658709",
    5: "410c52cc4109",
    6: "81301085712009",
    7: "01c18050301c1009",
    8: "010203040506070809",
}


def slow_pack(codes: Tensor, bits: int) -> Tensor:
    """The definition: bit `b` of a row's stream is bit `b % 8` of byte `b // 8`."""
    rows, n = codes.shape
    packed = torch.zeros((rows, row_bytes(n, bits)), dtype=torch.uint8)
    for row in range(rows):
        for i in range(n):
            for bit in range(bits):
                position = i * bits + bit
                packed[row, position // 8] |= (int(codes[row, i]) >> bit & 1) << position % 8
    return packed


def some_codes(rows: int, n: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", BITS)
def test_golden_bytes(bits: int) -> None:
    codes = torch.arange(1, 10).remainder(2**bits).to(torch.uint8)[None]
    assert bytes(pack(codes, bits)[0].tolist()).hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(0, 4), n=st.integers(0, 40), seed=st.integers(0, 99))
def test_packing_is_its_definition_and_its_own_inverse(bits: int, rows: int, n: int, seed: int) -> None:
    codes = some_codes(rows, n, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, slow_pack(codes, bits))
    assert torch.equal(unpack(packed, bits, n), codes)
    assert padding_is_zero(packed, bits, n)


@pytest.mark.parametrize("bits", BITS)
def test_strided_codes_pack_like_contiguous_ones(bits: int) -> None:
    codes = some_codes(13, 6, bits).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    packed = pack(codes, bits)
    wide = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    assert torch.equal(unpack(wide, bits, 13), codes)


def test_padding_that_is_set_is_seen() -> None:
    packed = pack(some_codes(2, 3, 3), 3)  # 9 bits in 2 bytes
    assert padding_is_zero(packed, 3, 3)
    packed[1, 1] |= 0b10
    assert not padding_is_zero(packed, 3, 3)


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.tensor([[0, 4]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes reach 4; 2 bits hold at most 3"):
        pack(codes, 2)
    with pytest.raises(ValueError, match="bits is 9; codes have 1 to 8 bits"):
        pack(codes, 9)
    with pytest.raises(ValueError, match=r"codes are torch.int64 of shape \[1, 2\]; uint8 \[rows, n\] is expected"):
        pack(codes.long(), 3)
    with pytest.raises(ValueError, match="packed rows have 2 bytes; 17 codes of 1 bits take 3"):
        unpack(codes, 1, 17)
