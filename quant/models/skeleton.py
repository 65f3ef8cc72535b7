"""A model whose weights come and go: built on the meta device, filled part by part from the checkpoint.

The pipeline never holds a whole model. A `Skeleton` knows which stored tensors make which parameters, and loads just
those that a set of parameters needs, through transformers' own renaming and merging rules (`core_model_loading`): files
with one matrix per expert become the fused 3-D parameter here exactly as they do in `from_pretrained`, for every
architecture, without a list of ours. Buffers (rotary tables) are real from the start; parameters are dropped back to
the meta device after use. Tied parameters follow their source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from quant.errors import ModelError
from quant.models.building import build, model_class, quiet, read_config, refuse_quantized
from quant.models.conversions import spare
from quant.models.source import STORED, Source
from quant.models.structure import end_of, inside, owner_of


class Skeleton:
    """`model` with parameters on meta, and the rules to fill them. `dtype` is what float parameters are loaded as.

    `prepare` changes the model before its parameters are mapped: the verification of a packed checkpoint puts packed
    modules in place.
    """

    def __init__(
        self, source: Source, *, dtype: torch.dtype = torch.float32, device: str = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:  # fmt: skip
        self.source = source
        self.dtype = dtype
        self.device = device
        self.lent: frozenset[str] = frozenset()
        self.change: Callable[[str, torch.Tensor], torch.Tensor] | None = None  # of what is loaded, by parameter
        self.copies: dict[str, str] = {}
        self.config: Any = None
        self.model: Any = self.open(packed=prepare is not None)
        if prepare is not None:
            prepare(self.model)
        self.place_buffers()
        self.remap()

    def open(self, *, packed: bool) -> Any:
        """The model with its parameters on meta. `packed`: whether a quantized checkpoint is what is expected."""
        config = read_config(self.source)
        if packed:
            del config.quantization_config
        else:
            refuse_quantized(self.source, getattr(config, "quantization_config", None))
        self.config = config
        model = build(model_class(self.source, config), config, self.dtype, self.source.name)
        model.config.use_cache = False
        return model

    def place_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def remap(self) -> None:
        """Works out which stored tensors make which parameters; call again after modules were replaced.

        `targets`: the parameters that each stored tensor goes into. `converted`: the stored tensors that are merged,
        split or turned on the way. `tied`: the further names of tied parameters, with the name whose tensor fills them.
        `copies`: parameters without a stored tensor that begin as a copy of another (see `untie`).
        """
        self.mapping = spare(get_model_conversion_mapping(self.model), self.model)
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state: dict[str, Any] = self.model.state_dict()
        self.names = tuple(state)  # asked for with each block
        prefix = self.model.base_model_prefix
        self.targets: dict[str, tuple[str, ...]] = {}
        converted: set[str] = set()
        for key in self.source.entries:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            names = (name,)
            if pattern is not None:
                first, *others = by_pattern[pattern].target_patterns
                names = (name, *(name.replace(first, other) for other in others))
                converted.add(key)
            self.targets[key] = tuple(target for target in names if target in state)
        self.converted = frozenset(converted)
        self.tied = self._tie()
        self.copies: dict[str, str] = {}
        found = {name for names in self.targets.values() for name in names}
        self.check_complete(name for name in state if name not in found and self.tied.get(name) not in found)

    def check_complete(self, names: Iterable[str]) -> None:
        """Raises `ModelError` if there are parameters that no stored tensor fills."""
        missing = list(names)
        if missing:
            raise ModelError(
                f"{self.source.name}: no stored weights for {missing[0]} ({len(missing)} such parameters in all); the "
                "checkpoint is incomplete or belongs to another architecture"
            )

    def _tie(self) -> dict[str, str]:
        """Ties on meta what the architecture ties; like transformers, not two stored tensors that differ."""
        stored = {target: key for key, targets in self.targets.items() for target in targets}
        groups: dict[str, list[str]] = {}
        for target, origin in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            groups.setdefault(origin, [origin]).append(target)
        tied: dict[str, str] = {}
        for members in groups.values():
            origin = next((name for name in members if name in stored), members[0])
            for name in members:
                if name != origin and (name not in stored or self.source.same(stored[name], stored[origin])):
                    tied[name] = origin
                    self._put(name, self._get(origin))
        return tied

    def alone(self, name: str) -> str | None:
        """The stored tensor of floats that is this parameter as it is, and no other; None where there is none."""
        keys = [key for key, targets in self.targets.items() if name in targets]
        plain = len(keys) == 1 and keys[0] not in self.converted and len(self.targets[keys[0]]) == 1
        return keys[0] if plain and self.source.entries[keys[0]].dtype in STORED else None

    def untie(self) -> dict[str, str]:
        """The head gets a tensor of its own. Returns what was tied, with what it was tied to."""
        head = end_of(self.model, "head")
        of_head = lambda name: owner_of(self.model, name)[0] is head  # noqa: E731
        untied = {name: one for name, one in self.tied.items() if of_head(name) or of_head(one)}
        stored = {name for targets in self.targets.values() for name in targets}
        for name in untied:
            del self.tied[name]
            self._put(name, nn.Parameter(torch.empty_like(self._get(name), device="meta"), requires_grad=False))
        self.copies = {name: one for name, one in untied.items() if name not in stored}
        return untied

    def load(self, names: Iterable[str]) -> None:
        """Fills the named parameters and persistent buffers, and every name tied to one of them.

        Raises:
            ModelError: stored tensors that do not fit, or hold NaN or infinite numbers.
        """
        wanted = {self.tied.get(name, name) for name in names}
        stored = {self.copies.get(name, name) for name in wanted}
        keys = [key for key, targets in self.targets.items() if stored.intersection(targets)]
        filled = {name for key in keys for name in self.targets[key]}
        along = filled - wanted  # split out of the same stored tensor
        along = {name for name in along if self._get(name).device.type == "meta"}
        with self.source.open(keys) as slices:
            self.fill(slices)
        for name in wanted & self.copies.keys():
            self._put(name, nn.Parameter(self._get(self.copies[name]).detach().clone(), requires_grad=False))
        self.unload(along)
        for name in sorted((filled | wanted) - along) if self.change is not None else ():
            assert self.change is not None
            self._put(name, self.change(name, self._get(name)))
        for name in wanted:
            parameter = self._get(name)
            if not _finite(parameter):
                raise ModelError(
                    f"{self.source.name}: {name} holds NaN or infinite weights; the checkpoint is damaged or was saved "
                    "in too narrow a dtype"
                )
            parameter.requires_grad_(False)
        for name, origin in self.tied.items():
            if origin in wanted:
                self._put(name, self._get(origin))

    def fill(self, slices: dict[str, Any]) -> None:
        """Puts stored tensors where they belong."""
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                slices,
                LoadStateDictConfig(
                    dtype=self.dtype,
                    dtype_plan=self.model._get_dtype_plan(self.dtype),
                    weight_mapping=self.mapping,
                    device_map={"": self.device},
                ),
            )
        for name, stored, expected in info.mismatched_keys:
            raise self.mismatch(name, stored, expected)
        for name, report in info.conversion_errors.items():  # a traceback, the message, then which operation it was
            why = report.strip().splitlines()[-2:][0]
            raise ModelError(f"{self.source.name}: {name}: its stored parts do not fit together ({why})")

    def mismatch(self, name: str, stored: Iterable[int], expected: Iterable[int]) -> ModelError:
        return ModelError(
            f"{self.source.name}: {name} is stored as {list(stored)}, and the architecture in config.json takes "
            f"{list(expected)}; config and weights do not belong together"
        )

    def unload(self, names: Iterable[str]) -> None:
        """Returns parameters to the meta device. The memory of tied ones is free once all their names are."""
        for name in names:
            origin = self.tied.get(name, name)
            alike = (origin, *(other for other, of in self.tied.items() if of == origin))
            others = (self._get(other) for other in alike if other != name)
            empty = next((other for other in others if other.device.type == "meta"), None)
            self._put(name, torch.empty_like(self._get(name), device="meta") if empty is None else empty)

    def _get(self, name: str) -> torch.Tensor:
        return getattr(*owner_of(self.model, name))

    def _put(self, name: str, value: torch.Tensor) -> None:
        owner, leaf = owner_of(self.model, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            kept = isinstance(value, nn.Parameter)
            owner._parameters[leaf] = value if kept else nn.Parameter(value, requires_grad=False)

    def names_under(self, *prefixes: str) -> list[str]:
        """State names inside the modules of these names (`""` is the whole model), but for what is `lent`: parts of
        blocks that the model calls from outside them, which come and go with what is outside."""
        lent = () if prefixes == ("",) else self.lent
        return [name for name in self.names if inside(name, *prefixes) and not inside(name, *lent)]


def _finite(tensor: torch.Tensor) -> bool:
    """Without a temporary of the tensor's size, as `isfinite` would make."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())
