"""Pictures of reports are drawn and not rendered, which is two thirds of the time of a run on a tiny model.

Imported by `conftest` and by the process that tests fork from; `test_report` renders them.
"""

from __future__ import annotations

from quant.checkpoint import plots

RENDERED = plots.rendered
plots.rendered = lambda figure: b"<svg/>"
