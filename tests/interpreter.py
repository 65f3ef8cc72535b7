"""Makes Triton's interpreter several times as fast, with the same results: what it does for every operation, once.

A launch patches the language, and so does every call of a device function in it: a third of the time. Another third
computes sums and products of integers once more, in 64 bits, for a check that is made only where `debug` is set, which
is nowhere. Most of the rest describes types and shapes that have been described before. A Triton whose interpreter
looks otherwise is left as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any


def hasten() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    own: Any = interpreter
    if all(hasattr(own, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder")):
        _skip_the_unread(own)
        _patch_once(own, (tl, tl.core))
        _describe_once(own, tl.core)


def _skip_the_unread(own: Any) -> None:
    """No 64-bit sums, whose check `device_assert` drops."""
    options = own.interpreter_builder.options
    if not options.debug:
        own.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _patch_once(own: Any, modules: tuple[Any, ...]) -> None:
    """For each of the modules that a function sees, once in a launch."""
    scope, patch, restore = own._LangPatchScope, own._patch_lang, own._LangPatchScope.restore
    seen, done = dict[Any, Any](), set[Any]()

    def patch_once(fn: Any) -> Any:
        if fn not in seen:
            seen[fn] = tuple(any(value is module for value in fn.__globals__.values()) for module in modules)
        if seen[fn] in done:
            return scope()
        made = patch(fn)
        done.add(seen[fn])
        return made

    def restore_all(self: Any) -> None:
        done.clear()
        restore(self)

    own._patch_lang, scope.restore = patch_once, restore_all


def _describe_once(own: Any, core: Any) -> None:
    numpy_type, describe = own._get_np_dtype, core.block_type.__init__
    types, blocks, shapes = dict[str, Any](), dict[Any, dict[str, Any]](), dict[Any, Any]()

    def known_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in types:
            types[name] = numpy_type(dtype)
        return types[name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.value if isinstance(shape, core.constexpr) else shape  # a tuple asked for a value may raise
        key = element_ty.name, tuple(size.value if isinstance(size, core.constexpr) else size for size in sizes)
        if key not in blocks:
            describe(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    own._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = known_type, block, tensor
