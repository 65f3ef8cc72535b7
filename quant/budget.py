"""A budget of time: the most thorough recipe whose predicted run fits into it.

The prediction is the dry run's, so a recipe is rehearsed before it is taken: about as long as one block of its run.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from quant.errors import SettingsError
from quant.estimate import estimate
from quant.prepare import Prepared
from quant.recipe import Recipe

RECIPES = ("best", "balanced", "fast")
"""Most thorough first."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> float:
    """`90s`, `30m`, `2h`, `1.5h`, `1h30m`. Raises `SettingsError` on anything else."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise SettingsError(f"--time-budget {text}: write it as 90s, 30m, 2h or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))


def within(
    budget: str, recipe: Callable[[str], Recipe], prepared: Callable[[Recipe], Prepared], say: Callable[[str], None]
) -> Prepared:
    """The first of `RECIPES` that is predicted to fit. `recipe(name)`: with the user's settings; `say`: what was found.

    Raises:
        SettingsError: none fits, with what the fastest would take.
    """
    limit = seconds(budget)
    predicted = 0.0
    for name in RECIPES:
        say(f"rehearsing recipe {name}")
        ready = prepared(recipe(name))
        predicted = estimate(ready).seconds
        if predicted <= limit:
            say(f"recipe {name}: about {predicted:.0f} s of the {limit:.0f} s allowed")
            return prepared(recipe(name))  # anew: the rehearsal has used the model
    raise SettingsError(
        f"--time-budget {budget}: recipe {RECIPES[-1]} alone takes about {predicted:.0f} s here; give more time, fewer "
        "--samples, or --recipe rtn, which reads no text"
    )
