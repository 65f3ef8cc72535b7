"""How much each calibration token counts: by the attention that its layer pays to it (RSQ, arXiv 2503.01820).

A token that many others read should be kept more exactly than one that none reads. RSQ's weight is the attention
received, summed over heads and queries, scaled to `[floor, 1]` by its extremes; the Hessian becomes the mean of
`r x xT`, with `r` of mean 1 over the tokens of a window. Two things are done differently:

- Under a causal mask the sum mostly says how early a token comes, since more queries see it: what is scaled is the mean
  over the queries that see it.
- A first or special token that draws most of the attention (a sink) would be the maximum and push all others down to
  the floor: what is above the quantile `clip` of its window counts as that quantile.

The attention is seen where it is computed: a function mode around one pass of the block looks at each
`scaled_dot_product_attention`, from whose arguments the probabilities follow, and at each softmax over the window's
tokens. So no model needs code of its own and none is switched to another implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.calibration.activations import Activations
from quant.calibration.replay import Replay
from quant.errors import CalibrationError, SettingsError

SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Attention:
    """`floor`: the weight of the least attended token, as a share of the most attended one's. `clip`: quantile that
    stands for everything above it."""

    floor: float = 0.3
    clip: float = 0.95

    def __post_init__(self) -> None:
        for name in ("floor", "clip"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(f"importance.{name} is {getattr(self, name)}; give more than 0 and at most 1")

    @torch.no_grad()
    def weights(
        self, replay: Replay, index: int, batches: Sequence[Mapping[str, Tensor]], previous: Sequence[Any] | Activations
    ) -> list[Tensor]:
        """Weights float32 `[B, T]` of the tokens of each batch in block `index`; `previous[b]`: the earlier block's
        output.

        Raises:
            CalibrationError: no attention among the batch's tokens is computed in this block in a way that can be seen.
        """
        found: list[Tensor] = []
        for number, batch in enumerate(batches):
            shape = next(iter(batch.values())).shape
            with Received(shape[0], shape[1]) as received:
                replay.output(index, batch, previous[number])
            if received.total is None or received.seen is None:
                raise CalibrationError(
                    f"{replay.names[index]}: no attention among its {shape[1]} tokens was seen (it has none, or a "
                    "fused kernel hides it), and the recipe weighs tokens by it; set importance to null in the recipe"
                )
            found.append(self.scaled(received.total / received.seen.clamp_min(1)))
        return found

    def scaled(self, attention: Tensor) -> Tensor:
        """Weights `[B, T]` of mean 1 from the attention that each token receives, window by window."""
        weights = list[Tensor]()
        for part in attention:
            part = part.clamp_max(part.sort().values[max(0, math.ceil(self.clip * len(part)) - 1)])
            low, high = part.min(), part.max()
            scaled = self.floor + (1 - self.floor) * (part - low) / (high - low) if high > low else part * 0 + 1
            weights.append(scaled / scaled.mean())
        return torch.stack(weights)


class Received(TorchFunctionMode):
    """Sums, over heads and queries, the attention paid to each of the `tokens` tokens of `rows` windows: `total`
    float32 `[rows, tokens]`, and `seen`, by how many of these each could be seen; None until there was any."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__()
        self.rows, self.tokens = rows, tokens
        self.total: Tensor | None = None
        self.seen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif func in SOFTMAX and self._among_tokens(result.shape):
            for row, probabilities in enumerate(result[..., : self.tokens]):
                self._add(row, probabilities.float())
        return result

    def _among_tokens(self, shape: Sequence[int]) -> bool:
        """`[B, heads, T, T]`, or with one more column for a learned sink (gpt-oss)."""
        width = (self.tokens, self.tokens + 1)
        return len(shape) == 4 and (shape[0], shape[2]) == (self.rows, self.tokens) and shape[3] in width

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        """The probabilities as torch documents the operator, one head of one window at a time."""
        rows, heads, queries, size = query.shape if query.dim() == 4 else (0, 0, 0, 0)
        if (rows, queries, key.shape[-2]) != (self.rows, self.tokens, self.tokens):
            return  # cross attention, or another sequence
        mask = None if attn_mask is None else attn_mask.expand(rows, heads, queries, queries)
        if is_causal:
            mask = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
            mask = mask.expand(rows, heads, -1, -1)
        for row in range(rows):
            for head in range(heads):
                k = key[row, head * key.shape[1] // heads].float()
                scores = query[row, head].float() @ k.T * (1 / math.sqrt(size) if scale is None else scale)
                if mask is not None:
                    part = mask[row, head]
                    scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
                self._add(row, scores.softmax(-1).nan_to_num(0.0)[None])

    def _add(self, row: int, probabilities: Tensor) -> None:
        """`[heads, queries, tokens]` of one window."""
        if self.total is None or self.seen is None:
            self.total = torch.zeros((self.rows, self.tokens), device=probabilities.device)
            self.seen = torch.zeros_like(self.total)
        self.total[row] += probabilities.sum((0, 1))
        self.seen[row] += (probabilities > 0).sum((0, 1))
