"""Block by block, then the head, is one whole forward pass: to the last bit, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from architectures import ARCHITECTURES, Stack, bare_linears, batch, make, module_list, sequential, shake
from quant.calibration.replay import Replay, Stop
from quant.errors import ModelError
from quant.models.walk import walk

BATCHES = (batch(1, 12), batch(2, 9, seed=3), batch(2, 10, padded=True, seed=4))


@torch.no_grad()
def replayed(model: nn.Module, chain: tuple[str, ...], inputs: dict[str, Any]) -> Any:
    output = None
    with Replay(model, chain) as replay:
        for index in range(len(chain)):
            output = replay.output(index, inputs, output)
        return replay.head(inputs, output)


def assert_equal(got: Any, expected: Any) -> None:
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True))
    assert any(isinstance(leaf, torch.Tensor) for leaf, _ in pairs)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_is_the_whole_pass(name: str) -> None:
    model = make(name)
    chain = walk(model, BATCHES[0]).chain
    for inputs in BATCHES:
        with torch.no_grad():
            expected = model(**inputs)[0]
        assert_equal(replayed(model, chain, inputs)[0], expected)


@pytest.mark.parametrize("build", [module_list, sequential, bare_linears])
def test_plain_modules(build: Any) -> None:
    model = build()
    key = "input_ids" if isinstance(model, Stack) else "input"
    for rows in (1, 2):
        inputs = {key: batch(rows)["input_ids"]}
        with torch.no_grad():
            expected = model(**inputs)
        assert_equal(replayed(model, walk(model, inputs).chain, inputs), expected)


def test_all_batches_through_one_block_before_the_next() -> None:
    """The order of the pipeline: every batch passes block k before any passes block k + 1."""
    model = make("gemma3")
    chain = walk(model, BATCHES[0]).chain
    outputs: list[Any] = [None] * len(BATCHES)
    with torch.no_grad(), Replay(model, chain) as replay:
        for index in range(len(chain)):
            outputs = [replay.output(index, *pair) for pair in zip(BATCHES, outputs, strict=True)]
        logits = [replay.head(*pair).logits for pair in zip(BATCHES, outputs, strict=True)]
    with torch.no_grad():
        assert_equal(logits, [model(**inputs).logits for inputs in BATCHES])


def test_arguments_are_those_of_the_whole_pass() -> None:
    model = make("gemma3")
    chain = walk(model, BATCHES[2]).chain
    given: dict[str, Any] = {}
    for name in chain:
        note = lambda _, *arguments, name=name: given.update({name: arguments})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**BATCHES[2], use_cache=False)
    seen, output = dict(given), None
    with torch.no_grad(), Replay(model, chain) as replay:
        for index, name in enumerate(chain):
            output = replay.output(index, BATCHES[2], output)
            assert_equal(given[name], seen[name])


def test_a_hook_may_stop_early() -> None:
    model = make("llama")
    chain = walk(model, BATCHES[0]).chain
    calls: list[str] = []
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append("after"))

    def stop(_module: nn.Module, args: Any) -> None:
        calls.append("stopped")
        raise Stop

    with torch.no_grad(), Replay(model, chain) as replay:
        first = replay.output(0, BATCHES[0], None)
        hook = layer.mlp.up_proj.register_forward_pre_hook(stop)
        assert replay.output(1, BATCHES[0], first) is None
        assert calls == ["stopped"]
        hook.remove()
        last = replay.output(1, BATCHES[0], first)
        logits = replay.head(BATCHES[0], last).logits
    calls.clear()
    with torch.no_grad():
        assert_equal(logits, model(**BATCHES[0]).logits)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = make("llama")
    chain = walk(model, BATCHES[0]).chain
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # somebody else's patch
    config = model.config.to_dict()
    with torch.no_grad():
        before = model(**BATCHES[0])
    try:
        with torch.no_grad(), Replay(model, chain) as replay:
            assert "forward" in model.model.layers[0].__dict__
            replay.output(0, {"input_ids": "no tensor"} if fails else BATCHES[0], None)
    except Exception:
        assert fails
    assert "forward" not in model.model.layers[0].__dict__
    assert model.model.layers[1].__dict__["forward"] is own
    assert model.config.to_dict() == config
    with torch.no_grad():
        after = model(**BATCHES[0])
    assert_equal(after.logits, before.logits)
    assert after.past_key_values is not None


def test_what_is_stored_is_not_written_into() -> None:
    class Inplace(Stack):
        """Adds something to each block's output in place, once per block."""

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            for number, block in enumerate(self.blocks):
                x = block(x)
                x += number + 1
            return self.head(x)

    model = shake(Inplace(4))
    inputs = batch(2)
    chain = walk(model, inputs).chain
    with torch.no_grad(), Replay(model, chain) as replay:
        outputs: list[Any] = []
        for index in range(len(chain)):
            outputs.append(replay.output(index, inputs, outputs[-1] if outputs else None))
            assert_equal(replay.output(index, inputs, outputs[-2] if index else None), outputs[-1])
        logits = replay.head(inputs, outputs[-1])
        assert_equal(replay.head(inputs, outputs[-1]), logits)
    with torch.no_grad():
        assert_equal(logits, model(**inputs))


class Wayward(Stack):
    """Takes another way for long inputs: past its last block, or in another order."""

    way = "short"

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        blocks = list(self.blocks)
        if input_ids.shape[1] > 12:
            blocks = blocks[:-1] if self.way == "short" else blocks[::-1]
        for block in blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(("way", "message"), [("short", "not reached by this batch"), ("back", "called before")])
def test_a_batch_that_goes_another_way_is_refused(way: str, message: str) -> None:
    model = shake(Wayward())
    model.way = way
    chain = walk(model, batch()).chain
    with torch.no_grad(), Replay(model, chain) as replay, pytest.raises(ModelError, match=message):
        replay.output(len(chain) - 1 if way == "short" else 0, batch(1, 20), torch.zeros(1, 20, 32))
