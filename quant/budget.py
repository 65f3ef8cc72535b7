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
from contextlib import suppress
from dataclasses import replace

from quant.checkpoint.shards import arrange, header, index_text, sizes
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
HEADER = 64  # bytes by which a site's entries in a header may differ with its bits; a further file's has fewer


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
        expected = estimate(tried)
        predicted = expected.seconds + expected.again_seconds
        left = limit - (time.perf_counter() - began)
        if predicted <= left:
            progress.say(f"recipe {name}: about {_seconds(predicted)} of the {_seconds(left)} left of {budget}")
            anew = prepared(recipe(name))  # the rehearsal has used the model
            return name, replace(anew, make=lambda *_, plan=tried.plan: plan)  # which may have been measured
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
            made = replace(recipe(bits), average=None)
            walked = walked or prepared(made)
            least, floats, weights = _promised(_planned(walked, made))
        except SettingsError:
            if bits == 1 and walked is None:
                raise
            continue
        if least > limit:
            continue
        chosen = made
        with suppress(SettingsError):  # no codes of one bit more, or of one less
            chosen = _finer(walked, made, bits, limit, floats, weights)
        progress.say(f"--size {size}: {chosen.average or bits:g} bits per weight")
        return prepared(chosen)
    smaller = walked is not None and walked.recipe.embeddings is None and not walked.source.is_diffusion
    raise SettingsError(
        f"--size {size}: the narrowest codes make {least:,} bytes, embeddings and all that stays float included; give "
        f"more{', or pack the embedding and the head too: --embedding-bits 8' if smaller else ''}"
    )


def _finer(walked: Prepared, made: Recipe, bits: int, limit: int, floats: int, weights: int) -> Recipe:
    """With the highest average that fits whatever plan it makes: in one file, or in several with an index. `made`
    itself where its codes are the widest. Raises `SettingsError` where none keep to an average."""
    finer, source = replace(made, average=float(bits)), walked.source
    by_cost = measured(finer, source)
    among = widths(finer) if by_cost else [bits, bits + 1]
    if bits >= min(MOST, among[-1]):
        return made
    plans = [_planned(walked, made), *(_planned(walked, finer, width) for width in among)]
    named = {name: piece for plan in plans for name, piece in promised_pieces(plan).items()}
    pieces = arrange(piece for shard in arrangement(plans[0], named) for piece in shard)
    most = max((source.folder / file).stat().st_size for file in source.files)
    files = 2 * limit // most + 2  # or fewer: two that follow each other hold more than one may
    room = limit - floats - len(header(pieces)) - HEADER * (len(walked.walk.sites) + files)
    room = max(min(room, most - floats), room - len(index_text([pieces, []], source.stem)))
    finer = replace(made, average=math.floor(8e4 * room / weights) / 1e4)
    if by_cost:
        allowance(finer, walked.walk, walked.settings)
        return finer
    return finer if _promised(_planned(walked, finer))[0] <= limit else made


def _planned(walked: Prepared, recipe: Recipe, bits: int | None = None) -> Prepared:
    """With a recipe's own plan, or these bits for every site; where a text is read, with the first
    tokens of every site that reads it alone in float."""
    sites, anchors = walked.walk.sites, frozenset[str]()
    if recipe.calibration is not None and (bits or recipe.average is None):
        anchors = frozenset(site.name for site in sites if site.words and site.kind == "linear")
    every = {site.name: bits for site in sites} if bits else None
    plan = make_plan(recipe, walked.walk, walked.settings, every, anchors)
    return replace(walked, recipe=recipe, make=lambda *_: plan)


def _promised(planned: Prepared) -> tuple[int, int, int]:
    """Bytes of all weight files and of what stays float in them, and quantized weights."""
    sites = quantized_sites(planned).values()
    shards = arrangement(planned, promised_pieces(planned))
    packed = sum(spec.nbytes(site.shape) for site, spec in sites)
    floats = sum(piece.nbytes for shard in shards for piece in shard) - packed
    files = sizes(shards, planned.source.stem)
    return sum(files.values()), floats, sum(site.weights for site, _ in sites)
