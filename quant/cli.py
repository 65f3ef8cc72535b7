"""Turn a float model into a packed low-bit checkpoint.

Shipped recipes: {}. Without --recipe it is balanced (trellis codes) below 4 bits and gptq (uniform grids) from
4 on, or where --group-size, --symmetric or --activations is given. Without --bits the recipe's own hold: 4 for gptq.

Examples:

  quantize --model ./Llama-3.1-8B --bits 2

  quantize --model Qwen/Qwen3-4B --bits 3 --group-size 64 --calibration notes.txt --out q3

  quantize --model ./model --size 5GiB

  quantize --model ./model --bits 4 --dry-run

  quantize --model ./model --bits 2 --time-budget 2h

  quantize --model ./model --bits 2 --recipe best --plan plan.json    (an edited one of another run)

  quantize --model ./pipeline --bits 4 --components transformer,text_encoder

  quantize --model ./model --bits 3 --skip '*.down_proj' --set solver.damp=0.05

  quantize --model ./model --bits 4 --activations 8

  quantize --model ./model --bits 4 --out q4 --resume

Exit codes: 0 done, 2 settings, 3 model, 4 calibration, 5 solver, 6 checkpoint, 7 folder in use by another run,
8 disk or memory, 130 interrupted, 143 terminated, 1 anything else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from quant.budget import RECIPES, sized, within
from quant.checkpoint.journal import Mode, check_place
from quant.checkpoint.words import asked_bits, code_bits, spec_words
from quant.display import Display, show_any
from quant.errors import BitwrightError, SettingsError
from quant.estimate import Estimate, estimate
from quant.kernels.spec import SpecError, Uniform
from quant.memory import map_large
from quant.models.source import COMPONENT
from quant.outcome import show_estimates, show_results
from quant.pipeline import Result, run_all
from quant.prepare import Prepared, Settings, prepare
from quant.progress import Progress
from quant.recipe import Recipe, load_recipe, override, shipped_recipes, with_spec
from quant.stopped import BEGUN, INTERRUPTED, TERMINATED, Terminated, terminate

HELP = (__doc__ or "").format(", ".join(shipped_recipes()))

MOST_THREADS = 1024
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
def quantize(
    model: Annotated[str, typer.Option(help="A local folder, or a name on the Hugging Face hub.")],
    bits: Annotated[
        float | None, typer.Option(help="Of each code, 1 to 8, plus scales; 2.5: an average; default: the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: <model>-<bits>bit here.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for whole rows.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="No zero points, or with.")] = None,
    activations: Annotated[int | None, typer.Option(help="8: inputs rounded to 8 bits, token by token.")] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Pack embedding and head too; default: float.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A name from above, or a file; default: balanced below 4 bits, else gptq.")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Pick best, balanced or fast by predicted time: 2h.")] = None,
    size: Annotated[str | None, typer.Option(help="Pick the most bits whose weight files fit into it: 5GiB.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A recipe's field: solver.damp=0.05.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration text: a name or a file (DiT: a file, or images).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: cuda if any.")] = None,
    dtype: Annotated[str | None, typer.Option(help="To compute in; default: float32 on a CPU, else bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that draws the calibration windows.")] = None,
    components: Annotated[
        str | None, typer.Option(help="Which of a pipeline, with commas between; default: transformer.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave float what this pattern names: '*.down_proj'.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Quantize only what this pattern names.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json: a spec for each linear, by name or pattern.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an earlier run in --out, begin again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict bytes, memory and time; write nothing.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: torch's choice, but one to solve small matrices.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
) -> None:
    mode = _mode(resume, restart, recipe, time_budget, components, bits, size, threads)
    values = {"text": calibration, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    grid = group_size, symmetric, activations
    make = lambda name, b=bits: _with(_recipe(name, b, *grid), settings, values, only, skip, embedding_bits)  # noqa: E731
    place, console = _place(device, dtype, plan, threads), Console(stderr=True, quiet=quiet)
    names = [name.strip() for name in (components or "").split(",")]
    out = _home(out) or (None if size else _folder(model, make(RECIPES[0] if time_budget else recipe)))
    if out and not dry_run:
        check_place(out, [name or COMPONENT for name in names], mode)
    with Display(console) if not quiet else Progress() as shown:
        ready = lambda made, part="": prepare(model, made, place, shown, part)  # noqa: E731
        parts = _prepared(names, recipe, time_budget, size, make, ready, shown)
        shown.say(_said(parts[0], BEGUN.recipe or recipe, bits, bool(size), *grid))
        done = (_rehearse if dry_run else _run)(parts, out or _folder(model, parts[0].recipe), mode, shown)
    if isinstance(done, Result):
        show_results(parts, done, console, as_json)
    else:
        show_estimates(parts, done, as_json, quiet)


def _prepared(
    names: Sequence[str], recipe: str | None, budget: str | None, size: str | None, make: Callable[..., Recipe],
    ready: Callable[..., Prepared], shown: Progress,
) -> list[Prepared]:  # fmt: skip
    if budget:
        BEGUN.recipe, chosen = within(budget, make, ready, shown)
        return [chosen]
    if size:
        return [sized(size, lambda bits: make(recipe, bits), ready, shown)]
    return [ready(make(recipe), name) for name in names]


def _run(parts: Sequence[Prepared], out: Path, mode: Mode, shown: Progress) -> Result:
    BEGUN.begin([out / part.source.inside for part in parts])
    return run_all(parts, out, mode, shown)


def _rehearse(parts: Sequence[Prepared], out: Path, mode: Mode, shown: Progress) -> list[Estimate]:
    try:
        check_place(out, [part.source.inside for part in parts], mode)
    except BitwrightError as error:
        shown.say(f"note: the run itself would be refused: {error}")
    shown.step("rehearsing the largest block")
    return [estimate(part) for part in parts]


def _named(
    name: str | None, bits: float | None, group_size: int | None, symmetric: bool | None, activations: int | None
) -> str:
    """The recipe's name: trellis codes where grids lose much and no flag of a grid was given."""
    grid = group_size is not None or symmetric is not None or activations == 8
    return name or ("balanced" if bits is not None and 1 <= bits < 4 and not grid else "gptq")


def _said(part: Prepared, name: str | None, bits: float | None, sized: bool, *grid: Any) -> str:
    """What a run is going to do, in a line."""
    recipe, plan = part.recipe, part.settings.plan
    name = _named(name, code_bits(recipe.spec.to_dict()) if sized else bits, *grid)
    average = f", {recipe.average:g} bits on average" if recipe.average else ""
    told = f"; sites that {plan} names as it says" if plan else ""
    return f"recipe {name}: {spec_words(recipe.spec.to_dict())}{average}{told}"


def _recipe(
    name: str | None, bits: float | None, group_size: int | None, symmetric: bool | None, activations: int | None
) -> Recipe:
    changes = {"bits": bits and int(bits), "group_size": group_size, "symmetric": symmetric, "activations": activations}
    chosen = with_spec(load_recipe(_named(name, bits, group_size, symmetric, activations)), **changes)
    return replace(chosen, average=bits if bits and bits % 1 else chosen.average)


def _place(device: str | None, dtype: str | None, plan: Path | None, threads: int | None) -> Settings:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Settings(device, dtype or ("float32" if device == "cpu" else "bfloat16"), plan, threads=threads or 0)


def _folder(model: str, recipe: Recipe) -> Path:
    """Where a run goes that was not told where."""
    return Path(f"{Path(model).absolute().name}-{asked_bits(recipe.to_dict())}bit")


def _home(out: Path | None) -> Path | None:
    """Shells leave the ~ of `--out=~/q4`, and a folder of that name is a trap."""
    return out and Path(os.path.expanduser(out))


def _mode(
    resume: bool, restart: bool, recipe: str | None, time_budget: str | None, components: str | None,
    bits: float | None, size: str | None, threads: int | None,
) -> Mode:  # fmt: skip
    """How a run begins. Raises `SettingsError` for flags that exclude each other and numbers that cannot be."""
    BEGUN.clear()
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise SettingsError(f"--threads is {threads}; give 1 to {MOST_THREADS}, or leave it out")
    if size and (bits is not None or time_budget or components):
        raise SettingsError("--size picks the bits of one model; leave out --bits, --time-budget and --components")
    if time_budget and components:
        raise SettingsError("--time-budget picks the recipe of one model; leave out --components, or give --recipe")
    if resume and restart:
        raise SettingsError("--resume and --restart exclude each other")
    if time_budget and (recipe or resume):
        raise SettingsError(
            "--time-budget picks a recipe, so it goes neither with --recipe nor with --resume; to resume give --recipe "
            "with the name that was picked"
        )
    if bits is not None and not 1 <= bits <= 8:
        raise SettingsError(f"--bits is {bits:g}; give a number from 1 to 8, for example 2, 2.33 or 4")
    if time_budget and (bits is None or bits > 4):
        raise SettingsError("--time-budget picks among recipes of 1 to 4 bits; give --bits too, for example --bits 2")
    return "resume" if resume else "restart" if restart else "new"


def _with(
    recipe: Recipe, settings: list[str] | None, values: dict[str, Any], only: list[str] | None, skip: list[str] | None,
    embedding_bits: int | None,
) -> Recipe:  # fmt: skip
    """The recipe with everything else that the command line says."""
    if embedding_bits is not None:
        recipe = replace(recipe, embeddings=replace(recipe.embeddings or Uniform(), bits=embedding_bits))
    recipe = override(recipe, settings or [])
    given = [f"calibration.{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
    if given and recipe.calibration is None:
        raise SettingsError(f"{given[0].split('=')[0]} has no effect: this recipe reads no text; leave it out")
    recipe = override(recipe, given)
    return replace(recipe, only=tuple(only or recipe.only), skip=tuple(skip or recipe.skip))


def main() -> None:
    """The console entry point: one sentence for every error that has one."""
    signal.signal(signal.SIGTERM, terminate)
    map_large()
    show_any()
    error_console = Console(stderr=True)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has turned Ctrl-C into its exit code
            raise KeyboardInterrupt
        sys.exit(code or 0)
    except (BitwrightError, SpecError) as error:
        error_console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, BitwrightError) else SettingsError.exit_code)
    except (KeyboardInterrupt, Terminated, typer.Abort) as stop:
        code = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        error_console.print(escape(BEGUN.told(sys.argv[1:])), soft_wrap=True)
        sys.exit(code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)  # a flag that typer refused
        if show is None:
            raise
        show()
        sys.exit(SettingsError.exit_code)


if __name__ == "__main__":
    main()
