"""The plan of a run that goes on: it need not be told again, nor measured. `run.json` has the specs; how much errors in
the rows count lies beside it in the journal."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from quant.checkpoint.journal import FOLDER, begun, unreadable
from quant.checkpoint.shards import Atomic
from quant.kernels.spec import SpecError, spec_from_dict
from quant.plan import Plan

ROWS = "rows.safetensors"
KINDS = ("rows.", "pairs.")  # of `Plan.counted`


def keep(folder: Path, plan: Plan) -> None:
    """Puts how much errors in the rows count into the journal `folder`."""
    if plan.rows:
        with Atomic(folder / ROWS) as out:
            out.write(save(plan.counted()))


def begun_texts(out: Path) -> bool | None:
    """Whether the calibration windows of the run in `out` begin with the token that begins a text."""
    with suppress(KeyError, TypeError):  # it did not get so far, or reads no text
        return bool(begun(out)["recipe"]["calibration"]["bos"])


def recall(out: Path) -> Plan | None:
    """The plan of the run in `out`, of a finished one without `rows`; None if it did not get so far.

    Raises:
        ResumeError: it cannot be read.
    """
    told, folder = begun(out), out / FOLDER
    counted = folder.exists() and "rows" in told
    if "plan" not in told or (counted and not (folder / ROWS).exists()):
        return None
    try:
        specs = {name: None if spec is None else spec_from_dict(spec) for name, spec in told["plan"].items()}
        known = load_file(folder / ROWS) if counted else {}
        parts = ({key.removeprefix(kind): known[key] for key in known if key.startswith(kind)} for kind in KINDS)
        return Plan(specs, *parts)
    except (OSError, SafetensorError, SpecError, AttributeError) as error:
        raise unreadable(folder if folder.exists() else out, error) from None
