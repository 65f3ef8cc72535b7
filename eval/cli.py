"""`quant-eval`: judge one or several checkpoints from the command line.

Exit codes: 0 done; 2 settings that cannot be; 3 a model that cannot be read; 6 a packed checkpoint that is damaged; 8
out of memory or disk; 130 interrupted. An error is one sentence on stderr.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import typer
from PIL import Image
from rich.console import Console

from quant.calibration.texts import resolve
from quant.checkpoint.card import add_evaluation
from quant.display import show_any
from quant.errors import BitwrightError, ResourceError, SettingsError
from quant.eval import options
from quant.eval.evaluate import evaluate
from quant.eval.painter import is_diffusion
from quant.eval.report import Report, write_json
from quant.eval.subject import Subject, open_subject, packed_by_us
from quant.eval.table import bars, console_for, continuations, table
from quant.memory import map_large

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_EPILOG = """
**Examples**

`quant-eval out/model-4bit` : perplexity, bits, speed and memory of one checkpoint

`quant-eval out/4bit out/2bit --against models/original --plot size.png` : what each lost, and the picture

`quant-eval gpt2 --text wikitext2 --stride 256` : a model from the hub, strided windows

`quant-eval out/4bit --against models/original --text notes.txt --max-windows 40 --json -` : own text, JSON on stdout

`quant-eval out/4bit --against models/original --card` : the figures go into the checkpoint's model card, too

`quant-eval out/encoder-4bit --against models/encoder` : cosines of hidden states

`quant-eval out/dit-4bit out/dit-2bit --against models/dit --judge judge.safetensors --sheet sheet.png` : a diffusion
transformer draws the same seeds as its original

Exit codes: 0 done, 2 settings, 3 model, 6 checkpoint, 8 disk or memory, 130 interrupted, 1 anything else.
"""


@app.command(epilog=_EPILOG)
def command(
    models: options.Models,
    against: options.Against = None,
    text: options.TextName = "python-docs",
    window: options.Window = None,
    stride: options.Stride = None,
    max_windows: options.MaxWindows = None,
    bos: options.Bos = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    prompts: options.Prompts = 3,
    no_generate: options.NoGenerate = False,
    images: options.Images = 256,
    steps: options.Steps = 50,
    guidance: options.Guidance = 1.0,
    seed: options.Seed = 0,
    batch: options.Batch = 64,
    judge: options.JudgeFile = None,
    real: options.Real = None,
    clip: options.Clip = None,
    reward: options.Reward = None,
    lpips: options.Lpips = None,
    sheet: options.Sheet = None,
    json_to: options.Json = None,
    plot_to: options.Plot = None,
    card: options.Card = False,
    quiet: options.Quiet = False,
) -> None:
    """Say how good a checkpoint is: perplexity or images, distance from the original, bits, speed and memory."""
    with _errors():
        _calm()
        _writable(json_to, plot_to, sheet)
        if any(is_diffusion(name) for name in [*models, *([against] if against else [])]):
            from quant.eval.show import Showing, show  # diffusion transformers are drawn with, not read

            rule = {"images": images, "steps": steps, "guidance": guidance, "seed": seed, "batch": batch}
            networks = (text, judge, real, clip, reward, lpips)
            show(models, against, rule, Showing(*networks, sheet, plot_to, json_to, device, dtype, card, quiet))
            return
        cards = _cards(models) if card else []
        _idle(models[0], judge=judge, real=real, clip=clip, reward=reward, lpips=lpips, sheet=sheet)
        settings = {"text": resolve(text), "window": window, "stride": stride, "max_windows": max_windows}
        settings |= {"bos": bos, "device": device, "dtype": dtype}
        original, reports = _judge(models, against, 0 if no_generate else prompts, quiet, settings)
        out = console_for(stderr=json_to == "-")
        if json_to:
            data = {"original": None if original is None else original.to_dict()}
            write_json(json_to, {**data, "models": [report.to_dict() for report in reports]})
        out.print(table([original, *reports] if original else reports, out.width))
        _doubt(out, [original or reports[0], *reports])
        for panel in [] if quiet else continuations(reports):
            out.print(panel)
        if plot_to:
            from quant.eval.plot import plot  # matplotlib takes a second to import

            plot(reports, original, plot_to)
            out.print(f"plot: {plot_to}", soft_wrap=True)
        for report in reports:
            if report.path in cards:
                add_evaluation(report.path, report.to_dict())
                out.print(f"model card: {report.path}/README.md", soft_wrap=True)


def _cards(models: list[str]) -> list[str]:
    """The folders whose cards are ours to write; raises `SettingsError` for none, or for a name in the hub's cache."""
    folders = [Path(name).expanduser() for name in models]
    ours = [str(folder) for folder in folders if folder.is_dir() and packed_by_us(folder)]
    if not ours or not all(folder.is_dir() for folder in folders):
        raise SettingsError(
            "--card: a packed checkpoint has the card; give its folder, no float model and no hub's name."
        )
    return ours


def _doubt(out: Console, reports: list[Report]) -> None:
    for note in dict.fromkeys(report.note for report in reports if report.note):
        out.print(note, soft_wrap=True)


def _idle(model: str, **drawn: Any) -> None:
    """Raises `SettingsError` for an option that judges images, of a model that makes none."""
    given = next((name for name, value in drawn.items() if value is not None), None)
    if given is not None:
        raise SettingsError(f"--{given} judges images, and {model} makes none; leave it out.")


def main() -> None:
    """The console entry point."""
    map_large()  # or scores hold the heap open: 0.8 GB more for each window where the vocabulary is 151,936
    show_any()
    app(prog_name="quant-eval")


def _judge(
    models: list[str], against: str | None, prompts: int, quiet: bool, settings: dict[str, Any]
) -> tuple[Report | None, list[Report]]:
    """The original's report (None without one) and those of the models, with a progress bar on stderr."""
    with bars(quiet) as bar:

        def run(source: str | Subject, name: str, original: Subject | None, generate: int) -> Report:
            return evaluate(source, against=original, generate=generate, progress=bar(name), **settings)

        if against is None:
            reports = [run(model, model, None, prompts) for model in models]
            if any(report.kind == "encoder" for report in reports):
                name = next(report.model for report in reports if report.kind == "encoder")
                raise SettingsError(
                    f"{name} has no language-model head, so it has no perplexity; give --against ORIGINAL to compare "
                    "its hidden states."
                )
            return None, reports
        opened = open_subject(against, settings["device"], settings["dtype"])
        reports = [run(model, model, opened, prompts) for model in models]
        settings = {**settings, "window": reports[0].settings.window, "known": reports[0].original}  # seen beside it
        return run(opened, against, None, 0), reports


@contextmanager
def _errors() -> Generator[None]:
    """Turns our errors into a sentence and their exit code."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        _fail(
            ResourceError("out of memory; try a smaller --window or --batch, --dtype bfloat16, or leave --against out.")
        )
    except BitwrightError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(error: BitwrightError) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(error.exit_code) from None


def _calm() -> None:
    """Our progress bar is the only one, and our sentence the only complaint."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # importing datasets to say so takes a second
    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _writable(json_to: str | None, plot: Path | None, sheet: Path | None) -> None:
    """Raises `SettingsError` now rather than after the work when an output file has no folder to lie in or is one, or
    when nothing can write a picture of its ending."""
    for target in (json_to, plot, sheet):
        if target is not None and target != "-" and not Path(target).absolute().parent.is_dir():
            raise SettingsError(f"{target}: its folder does not exist; create it first.")
        if target is not None and Path(target).is_dir():
            raise SettingsError(f"{target}: a folder; give a file in it.")
    if plot is not None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # matplotlib takes a second to import

        if plot.suffix.lower()[1:] not in FigureCanvasAgg.get_supported_filetypes():
            raise SettingsError(f"plot {plot}: no known kind of picture; end its name in .png, .pdf or .svg.")
    if sheet is not None and Image.registered_extensions().get(sheet.suffix.lower()) not in Image.SAVE:
        raise SettingsError(f"sheet {sheet}: no known kind of picture; end its name in .png, .jpg or .webp.")


if __name__ == "__main__":
    main()
