"""A budget of time: the most thorough recipe whose predicted run fits into it. A budget of bytes: the most bits per
weight whose checkpoint fits into it.

The prediction of time is the dry run's, so a recipe is rehearsed before it is taken: about as long as one block of its
run. Bytes need no guess: the specs promise them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace

from quant.checkpoint.shards import sizes
from quant.checkpoint.writer import arrangement, promised_pieces, quantized_sites
from quant.errors import SettingsError
from quant.estimate import estimate
from quant.plan import make_plan
from quant.planning import allowance, measured, widths
from quant.prepare import Prepared
from quant.progress import Progress
from quant.recipe import Recipe

RECIPES = ("best", "balanced", "fast")
"""Most thorough first."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MOST = 8
HEADER = 64  # bytes by which the entries of a site in a file's header may grow with its bits


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, `1.5h`, `1h30m`. Raises `SettingsError` on anything else."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise SettingsError(f"--time-budget {text}: write it as 90s, 30m, 2h or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))


def within(
    budget: str, recipe: Callable[[str], Recipe], prepared: Callable[[Recipe], Prepared], progress: Progress
) -> tuple[str, Prepared]:
    """The first of `RECIPES` that is predicted to fit, with its name. What the rehearsals take comes off the budget.
    `recipe(name)`: with the user's settings.

    Raises:
        SettingsError: none fits, with what the fastest would take.
    """
    limit, began = seconds(budget), time.perf_counter()
    name, predicted = "", 0.0
    for name in RECIPES:
        progress.step(f"rehearsing recipe {name}")
        tried = prepared(recipe(name))
        predicted = estimate(tried).seconds
        left = limit - (time.perf_counter() - began)
        if predicted <= left:
            progress.say(f"recipe {name}: about {_seconds(predicted)} of the {_seconds(left)} left of {budget}")
            anew = prepared(recipe(name))  # the rehearsal has used the model
            return name, replace(anew, make=lambda _, plan=tried.plan: plan)  # which may have been measured
        progress.say(
            f"not recipe {name}: about {_seconds(predicted)}, and {_seconds(max(0.0, left))} are left of {budget}"
        )
        if left <= 0:
            break
    raise SettingsError(
        f"--time-budget {budget}: recipe {name} alone takes about {_seconds(predicted)} here, after "
        f"{_seconds(time.perf_counter() - began)} to find that out; give more time, fewer --samples, or --recipe rtn, "
        "which reads no text"
    )


def _seconds(count: float) -> str:
    return f"{count:.0f} s" if count >= 10 else f"{count:.1f} s"


def nbytes(text: str) -> int:
    """`5GiB`, `700MB`, `1.5 GB`, `90000000`. Raises `SettingsError` on anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = BYTES.get((found[2] or "b").lower()) if found else None
    if found is None or unit is None:
        raise SettingsError(f"--size {text}: write it as 5GiB, 700MB or in bytes")
    return int(float(found[1]) * unit)


def sized(
    size: str, recipe: Callable[[float], Recipe], prepared: Callable[[Recipe], Prepared], progress: Progress
) -> Prepared:
    """The most bits per weight whose weight files, all that stays float included, have at most `size` bytes.
    `recipe(bits)`: with the user's settings; raises `SettingsError` where its codes have no such width.

    Raises:
        SettingsError: the narrowest codes are too large already, with what they take.
    """
    limit, least = nbytes(size), 0
    walked: Prepared | None = None
    for bits in range(MOST, 0, -1):
        try:
            made = recipe(bits)
            walked = walked or prepared(made)
            least, packed, weights = _promised(walked, made)
        except SettingsError:
            if bits == 1 and walked is None:
                raise
            continue
        if least > limit:
            continue
        room = limit - least + packed - HEADER * len(walked.walk.sites)
        average = math.floor(8e4 * room / weights) / 1e4
        finer = replace(made, average=average)
        try:
            if measured(finer, walked.source):
                allowance(finer, walked.walk, walked.settings)
                fits = bits < min(MOST, widths(finer)[-1])
            else:
                fits = bits < MOST and _promised(walked, finer)[0] <= limit
        except SettingsError:
            fits = False  # no codes of one bit more, or of one less
        chosen = finer if fits else made
        progress.say(f"--size {size}: {average if chosen is finer else bits:g} bits per weight")
        return prepared(chosen)
    raise SettingsError(
        f"--size {size}: the narrowest codes make {least:,} bytes, embeddings and all that stays float included; give "
        "more"
    )


def _promised(walked: Prepared, recipe: Recipe) -> tuple[int, int, int]:
    """Bytes of all weight files and of the packed sites, and quantized weights; of a recipe's own bits."""
    plan = make_plan(recipe, walked.walk, walked.settings.plan)
    ready = replace(walked, recipe=recipe, make=lambda _: plan)
    sites = quantized_sites(ready).values()
    files = sizes(arrangement(ready, promised_pieces(ready)), ready.source.stem)
    packed = sum(spec.nbytes(site.shape) for site, spec in sites)
    return sum(files.values()), packed, sum(site.shape[0] * site.shape[1] for site, _ in sites)
