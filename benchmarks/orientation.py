"""Which way a trellis's sequences should run: along the outputs, or over tiles of 16 x 16 weights.

    python benchmarks/orientation.py [--data DIR]

Along the outputs (what bitwright does) error feedback corrects after every column; with QTIP's tiles (arXiv 2406.11235,
section 3.3; block LDLQ) after 16. Every linear inside the blocks of a model is solved both ways, with the same code,
window, scales, order of columns and Hessian, of the float model's inputs on the calibration text; no descent, with and
without the rotation. The error is `tr(D H DT) / tr(W H WT)`. The model is demo/model and, with DIR, ts-llama-small.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import quality
import record
import torch
from torch import Tensor, nn

from quant.calibration.samples import draw
from quant.calibration.statistics import HessianCollector, Statistics
from quant.eval.subject import open_subject
from quant.kernels.rotated import IDENTITY
from quant.kernels.spec import Trellis
from quant.kernels.trellis import read
from quant.kernels.viterbi import search
from quant.models.source import find
from quant.recipe import Calibration
from quant.solvers.basis import rotate, rotation
from quant.solvers.factor import factorise
from quant.solvers.feedback import feed
from quant.solvers.solution import relative_error
from quant.solvers.trellis import TrellisRounder

TILE = 16
SHOWN = ("out", "in", "matrices", "rotated", "bits", "along outputs", "tiles", "tiles / along")


class Tiles(TrellisRounder):
    """Rounds 16 columns together, in tiles of 16 x 16 weights, row by row; scales as of its base."""

    granularity = TILE

    def round(self, columns: Tensor, values: Tensor) -> Tensor:
        rows, width = values.shape
        scales = self.scales[:, None].expand(rows, width)
        padded = (-(-rows // TILE), TILE, TILE)
        target, weight = values.new_zeros((2, padded[0] * TILE, TILE))
        target[:rows, :width] = torch.where(scales > 0, values / scales, 0.0)
        weight[:rows, :width] = scales.square() / scales.square().mean().clamp_min(1e-30)
        x, w = (part.view(padded[0], -1) for part in (target, weight))
        found = read(self.values, search(x, w, self.values, self.spec.step))
        return found.view(-1, TILE)[:rows, :width] * scales


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--matrices", type=int, default=3, help="of each shape and model, spread over the depth")
    args = parser.parse_args()
    parts = [("demo/model", compare(record.DEMO, "python-docs:calibration", args), SHOWN)]
    found = record.present(args.data, "models/ts-llama-small", quality.CALIBRATION)
    if found is not None:
        parts.append(("ts-llama-small", compare(found[0], str(found[1]), args), SHOWN))
    notes = ["errors: geometric means over the matrices of one shape."]
    record.save(args.results, "orientation", "Sequences along the outputs, or tiles", parts, notes)


@torch.no_grad()
def compare(model: Path, text: str, args: Any) -> list[dict[str, Any]]:
    shapes: dict[tuple[int, int], list[tuple[Tensor, Statistics]]] = {}
    for weight, statistics in inputs_of(model, text):
        shapes.setdefault((weight.shape[0], weight.shape[1]), []).append((weight, statistics))
    rows: list[dict[str, Any]] = []
    for (out, columns), every in sorted(shapes.items()):
        taken = every[:: max(1, len(every) // args.matrices)][: args.matrices]
        for bits in args.bits:
            for turned in (False, True):
                basis = rotation(columns, 128, torch.zeros(())) if turned else IDENTITY
                lost = {TrellisRounder: 0.0, Tiles: 0.0}
                for weight, statistics in taken:
                    given = basis.apply(weight), rotate(statistics, basis)
                    for kind in lost:
                        lost[kind] += math.log(error(kind, *given, Trellis(bits=bits))) / len(taken)
                along, tiles = (math.exp(value) for value in lost.values())
                row = {"out": out, "in": columns, "matrices": len(taken), "rotated": turned, "bits": bits}
                rows.append({**row, "along outputs": along, "tiles": tiles, "tiles / along": tiles / along})
                print(rows[-1], flush=True)
    return rows


def inputs_of(model: Path, text: str) -> list[tuple[Tensor, Statistics]]:
    """Every linear inside the blocks: its weight, and the statistics of what the float model gives it."""
    subject = open_subject(model)
    source = find(str(model))
    batches = draw(Calibration(text=text, samples=32), source, subject.model).batches
    head: Any = subject.model.get_output_embeddings()
    linears = [m for m in subject.model.modules() if isinstance(m, nn.Linear) and m is not head]
    collectors = {module: HessianCollector(module.in_features) for module in linears}
    for module, collector in collectors.items():
        module.register_forward_pre_hook(lambda _, x, own=collector: own.update(x[0].flatten(0, -2)))
    for batch in batches:
        subject.model(**batch)
    return [(module.weight.float(), collector.finish()) for module, collector in collectors.items()]


def error(kind: type[TrellisRounder], weight: Tensor, statistics: Statistics, spec: Trellis) -> float:
    rounder = kind(spec, (weight.shape[0], weight.shape[1]), weight.device)
    factor = factorise(statistics, "gar", 0.01, rounder.span, rounder.granularity)
    assert not isinstance(factor, str)
    found = feed(weight, factor, rounder, factor.hessian.diagonal(), 128, False)
    return relative_error(weight, found, statistics.hessian)


if __name__ == "__main__":
    main()
