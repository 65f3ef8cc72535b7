"""Recipes: what will be done, as data that reruns it exactly.

A `Recipe` holds solver *objects*; Python is the registry. Recipes that ship are files under `recipes/`, one `RECIPE`
constant each; a user's own is the same kind of file, or the `recipe.json` that lies beside every checkpoint. Dotted
overrides (`solver.damp=0.05`) reach any field.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quant.calibration.importance import Attention
from quant.calibration.settings import Calibration as Calibration
from quant.calibration.settings import Experts as Experts
from quant.calibration.settings import Trajectory as Trajectory
from quant.errors import SettingsError
from quant.kernels.spec import WRAPPERS, Spec, SpecError, Uniform, spec_from_dict
from quant.models.folding import Folding
from quant.recovery.assignments import Assignments
from quant.recovery.distillation import Distillation
from quant.recovery.tuning import BlockTuning
from quant.solvers.feedback import Feedback
from quant.solvers.nearest import Nearest

CHOICES: dict[str, tuple[type[Any], ...]] = {
    "solver": (Feedback, Nearest),
    "recovery": (BlockTuning, Assignments),
    "importance": (Attention,),
}
OPTIONAL = ("recovery", "importance", "distillation", "folding", "calibration", "embeddings")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a checkpoint, beside the model and the machine.

    `sequential`: inside a block, later sites see the inputs that the already quantized ones produce. `match`: what a
    solver aims at: `quantized`, the layer's own outputs on inputs from the already quantized blocks; or `float`, the
    float path's outputs from those same inputs. `recovery`: what is done to a block once its sites are solved, to bring
    its outputs back to the float path's; None: nothing. `distillation`: what is done to the whole model once all blocks
    are solved; None: nothing. `importance`: how much each token counts in a Hessian; None:
    all the same. `average`: at most so many bits per weight over all sites, overhead included, by giving some of them
    one bit more than `spec` (see `plan.py`); None: `spec` everywhere. `mixed`: the sites of a language model get more
    or fewer bits than a trellis' own by what an error of each costs at the output (`fisher.py`), in as many bytes, or
    within `average`; and rows count by it, each and two together. `widths`: among which bits; None: of a trellis
    all that its code has, else (2, 3, 4, 8); [] leaves the bits as they are. Where they are given, and for a diffusion
    transformer always, `average` alone chooses by cost too. `sensitivity`: what an error costs: `output`, at the
    output; `image`, at a diffusion transformer's final image, by two metrics (`decoupled.py`). `calibration` None:
    data-free, no text is read. `trajectory`: where the inputs of a diffusion transformer come from. `modulation_bits`:
    the least that its adaLN modulations get (see `plan.py`).
    `folding`: rotations that are folded into the weights before anything else is done (`models/folding.py`).
    `embeddings`: the grid that a language model's embedding of tokens and its head get (`ends.py`); their bits are
    counted apart from all others. None: they stay float.
    `only`, `skip`: glob patterns over site names.
    """

    spec: Spec = field(default_factory=Uniform)
    solver: Any = field(default_factory=Feedback)
    calibration: Calibration | None = field(default_factory=Calibration)
    trajectory: Trajectory = field(default_factory=Trajectory)
    experts: Experts = field(default_factory=Experts)
    sequential: bool = True
    match: Literal["quantized", "float"] = "quantized"
    recovery: Any = None
    distillation: Distillation | None = None
    importance: Any = None
    average: float | None = None
    mixed: bool = False
    widths: tuple[int, ...] | None = None
    sensitivity: Literal["output", "image"] = "output"
    modulation_bits: int = 4
    folding: Folding | None = None
    embeddings: Uniform | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.trains and self.calibration is None:
            raise SettingsError("tuning trains on the calibration text, and this recipe has none; give one")
        if self.importance is not None and not isinstance(self.importance, CHOICES["importance"]):
            raise SettingsError(f"importance is {self.importance!r}; give an Attention() in a recipe file, or null")
        if self.importance is not None and self.calibration is None:
            raise SettingsError("importance weighs the calibration text's tokens, and this recipe has none; give one")
        if self.average is not None and not 0 < self.average < math.inf:
            raise SettingsError(f"average is {self.average} bits per weight; give a number from 1 to 8")
        if self.embeddings is not None and (self.folding is not None or self.embeddings.activations == 8):
            raise SettingsError(
                "embeddings: what is folded into them stays float, and what they are multiplied by is not rounded; set "
                "embeddings or folding to null, and embeddings.activations to 16"
            )
        if any(not 1 <= width <= 8 for width in self.widths or ()):
            raise SettingsError(f"widths are {list(self.widths or ())}; give numbers of bits from 1 to 8")

    @property
    def matched(self) -> bool:
        """Whether solvers aim at the float path's outputs."""
        return self.match == "float" and self.calibration is not None

    @property
    def followed(self) -> bool:
        """Whether the float path is run beside the quantized one."""
        return self.matched or self.recovery is not None

    @property
    def trains(self) -> bool:
        """Whether gradients are taken."""
        return self.recovery is not None or self.distillation is not None

    def to_dict(self) -> dict[str, Any]:
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, part in data.items():
            if isinstance(part, Spec):
                data[name] = part.to_dict()
            elif is_dataclass(part) and not isinstance(part, type):
                kind = {"kind": type(part).__name__} if name in CHOICES else {}
                data[name] = {**kind, **asdict(part)}
        return json.loads(json.dumps(data))


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`; unknown keys are refused by name."""
    values = dict(data)
    try:
        for name in ("spec", "embeddings"):
            if values.get(name) is not None:
                values[name] = spec_from_dict(values[name])
    except SpecError as error:
        raise SettingsError(f"recipe: {error}") from None
    for name in CHOICES:
        if name in values:
            values[name] = _chosen(values[name], name)
    parts = {"calibration": Calibration, "trajectory": Trajectory, "distillation": Distillation, "experts": Experts}
    parts |= {"folding": Folding}
    for name, kind in parts.items():
        if values.get(name) is not None:
            values[name] = _build(kind, _mapping(values[name], name), name)
    return _build(Recipe, values, "recipe")


def _chosen(given: Any, name: str) -> Any:
    """An object of the kind that `given` names; None where there may be none."""
    if given is None and name != "solver":
        return None
    kinds, data = {kind.__name__: kind for kind in CHOICES[name]}, _mapping(given, name)
    kind = data.get("kind")
    if kind not in kinds:
        raise SettingsError(f"recipe: {name} kind {kind!r} is unknown; this version has {', '.join(sorted(kinds))}")
    return _build(kinds[kind], {key: value for key, value in data.items() if key != "kind"}, name)


def load_recipe(name: str) -> Recipe:
    """A recipe by the name of a shipped one, or from a `.json` or `.py` file."""
    path = Path(name)
    if path.suffix == ".json":
        try:
            return recipe_from_dict(_mapping(json.loads(path.read_text(encoding="utf-8")), name))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SettingsError(f"--recipe {name}: cannot be read ({error})") from None
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location("bitwright_recipe", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise SettingsError(f"--recipe {name}: no such file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's own code
            raise SettingsError(f"--recipe {name}: cannot be run ({type(error).__name__}: {error})") from error
    else:
        try:
            if not name.isidentifier():
                raise ModuleNotFoundError
            module = importlib.import_module(f"quant.recipes.{name}")
        except ModuleNotFoundError:
            raise SettingsError(
                f"--recipe {name}: no such recipe; shipped are {', '.join(shipped_recipes())}, or give a .json or .py "
                "file"
            ) from None
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise SettingsError(f"--recipe {name}: the file defines no RECIPE of type quant.Recipe")
    return recipe


def shipped_recipes() -> list[str]:
    folder = Path(__file__).parent / "recipes"
    return sorted(path.stem for path in folder.glob("*.py"))


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with dotted `path=value` settings applied, values read as the field's own type."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise SettingsError(f"--set {setting}: write it as path=value, for example solver.damp=0.05")
        recipe = _replace_at(recipe, path.split("."), text, setting)
    return recipe


def _replace_at(owner: Any, path: list[str], text: str, setting: str) -> Any:
    names = [item.name for item in fields(owner)]
    if path[0] not in names:
        raise SettingsError(f"--set {setting}: {type(owner).__name__} has no {path[0]!r}; it has {', '.join(names)}")
    old = getattr(owner, path[0])
    if len(path) > 1:
        if not is_dataclass(old):
            raise SettingsError(f"--set {setting}: {path[0]} is {old!r}, which has no parts")
        value = _replace_at(old, path[1:], text, setting)
    elif is_dataclass(old) and not (text == "null" and path[0] in OPTIONAL):
        raise SettingsError(
            f"--set {setting}: {path[0]} has parts; set one of them, for example {path[0]}.{fields(old)[0].name}"
        )
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if isinstance(owner, Recipe) and path[0] in CHOICES:
            value = _chosen(value, path[0])
    return _build(type(owner), {**{n: getattr(owner, n) for n in names}, path[0]: value}, f"--set {setting}")


def _build(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """`kind(**values)` with names and types checked against the annotations."""
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind)]
    for name in values:
        if name not in names:
            raise SettingsError(f"{where}: unknown key {name!r}; known are {', '.join(names)}")
    try:
        return kind(**{name: _coerce(value, hints[name], f"{where}: {name}") for name, value in values.items()})
    except (SpecError, ValueError, TypeError) as error:
        raise SettingsError(str(error) if isinstance(error, SettingsError) else f"{where}: {error}") from None


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in options:
            return value
        raise SettingsError(f"{where} is {value!r}; choose {', '.join(map(str, options))}")
    if origin in (Union, UnionType):
        for option in options:
            if option is type(None) and value is None:
                return None
        return _coerce(value, next(option for option in options if option is not type(None)), where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(item, options[0], where) for item in value)  # pyright: ignore[reportUnknownVariableType]
        return (_coerce(value, options[0], where),)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, where)  # pyright: ignore[reportArgumentType]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind: Any = hint
    if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
        raise SettingsError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{where}: expected a JSON object, found {value!r}")
    return value  # pyright: ignore[reportUnknownVariableType]


def with_spec(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with fields of its spec replaced; None leaves a field alone."""
    return replace(recipe, spec=respec(recipe.spec, **changes))


def respec(spec: Spec, **changes: Any) -> Spec:
    """The spec with fields of its codes replaced, inside the same wrappers; None leaves a field alone.

    Raises:
        SettingsError: there is no such spec.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return _with_core(spec, replace(spec.core, **given))
    except SpecError as error:
        raise SettingsError(str(error)) from None
    except TypeError:
        none = ", ".join(sorted(given.keys() - {item.name for item in fields(spec.core)}))
        raise SettingsError(f"{type(spec.core).__name__} has no {none}; take a recipe of uniform grids: gptq") from None


def _with_core(spec: Spec, core: Spec) -> Spec:
    """The spec with other codes inside the same wrappers."""
    return replace(spec, base=_with_core(spec.base, core)) if isinstance(spec, WRAPPERS) else core
