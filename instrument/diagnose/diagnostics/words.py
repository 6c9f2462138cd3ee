"""What findings share: places and numbers as people say them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from instrument.capture.names import Site
from instrument.diagnose.readings import Reading

__all__ = ["is_root", "leaves", "listed", "newest", "percent", "place", "role"]

_PLACES = {
    "activations": "the output of {}",
    "activation_gradients": "the gradient of the output of {}",
    "parameters": "{} after the step",
    "gradients": "the gradient of {}",
    "updates": "the update of {}",
}
_LISTED = 6


def place(site: Site) -> str:
    """A site as people say it.

    Example:
        >>> place(Site("gradients", "fc.weight"))
        'the gradient of fc.weight'
    """
    return _PLACES[site.kind].format(site.name)


def percent(share: float) -> str:
    """A share as people say it.

    Example:
        >>> percent(0.123), percent(0.0004)
        ('12 %', '0.04 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def listed(names: Iterable[str]) -> str:
    """Names behind commas, the first of many."""
    every = list(names)
    more = len(every) - _LISTED
    return ", ".join(every[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def role(name: str) -> str:
    """What layers of the same role at different depths have in common: the name without its numbers.

    Example:
        >>> role("blocks.11.mlp.fc1.weight")
        'blocks.*.mlp.fc*.weight'
    """
    return re.sub(r"\d+", "*", name)


def is_root(name: str) -> bool:
    """Whether a module is the model itself, which is shown by the name of its class.

    Example:
        >>> is_root("Sequential"), is_root("blocks"), is_root("0")
        (True, False, False)
    """
    return "." not in name and (name[:1].isupper() or name[:1] == "(")


def newest(readings: Sequence[Reading], count: int, counts: Callable[[Reading], Any]) -> list[Reading]:
    """The last readings that count, oldest first; none where the newest does not, or there are too few.

    Args:
        readings: Oldest first.
        count: How many are wanted.
        counts: Whether a reading counts.

    Returns:
        So many readings, or none.
    """
    if not counts(readings[-1]):
        return []
    found = list(itertools.islice(filter(counts, reversed(readings)), count))
    return found[::-1] if len(found) == count else []


def leaves(reading: Reading) -> list[str]:
    """Modules that hold no other, in the order of execution."""
    names = [name.partition("[")[0] for name in reading.column("activations", "rms")]
    parents = {name[:cut] for name in names for cut in range(len(name)) if name[cut] == "."}
    found = [name for name in dict.fromkeys(names) if name not in parents]
    # The root returns last and holds all others, although no dot says so.
    return found[:-1] if len(found) > 1 and is_root(found[-1]) else found
