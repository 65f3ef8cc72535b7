"""A run's plan, kept in its journal: a run that goes on need not be told it, nor measure again what it was made by."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from quant.checkpoint.journal import FOLDER, read_json, unreadable
from quant.checkpoint.shards import Atomic, write_text
from quant.kernels.spec import SpecError, spec_from_dict
from quant.plan import Plan

PLAN, ROWS = "plan.json", "rows.safetensors"


def keep(folder: Path, plan: Plan) -> None:
    """Puts the plan into the journal `folder`."""
    if plan.rows:
        with Atomic(folder / ROWS) as out:
            out.write(save(dict(plan.rows)))
    write_text(folder / PLAN, json.dumps(plan.to_dict(), indent=2) + "\n")


def recall(out: Path) -> Plan | None:
    """The plan of the run in `out`, of a finished one without `rows`; None if it did not get so far.

    Raises:
        ResumeError: it cannot be read.
    """
    folder = out / FOLDER if (out / FOLDER).exists() else out
    if not (folder / PLAN).exists():
        return None
    try:
        told = read_json(folder / PLAN)
        specs = {name: None if spec is None else spec_from_dict(spec) for name, spec in told.items()}
        return Plan(specs, load_file(folder / ROWS) if (folder / ROWS).exists() else {})
    except (OSError, SafetensorError, SpecError) as error:
        raise unreadable(folder / PLAN, error) from None
