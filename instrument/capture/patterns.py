"""Globs and regular expressions over dotted names.

Globs are matched by the package `fnmatch2`, with the dots of a name as its path separators. `fnmatch2` 0.0.8
does not go back after `**` (`**.norm.weight` misses `a.norm.x.norm.weight`), so here it matches one level at a
time and this module walks the levels, keeping every place at which the pattern may stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fnmatch2 import fnmatchcase2

from instrument.config import SECTIONS
from instrument.errors import SelectionError

__all__ = ["Pattern", "Patterns"]

REGEX_PREFIX = "re:"
_TAG_PREFIX = re.compile(rf"(?:{'|'.join(SECTIONS.values())})(?:\.\w+)?/")
_OUTPUT_SUFFIX = re.compile(r"(?:\[[^\[\]]*\])+$")


class Pattern:
    """One glob, or regular expression behind ``re:``, over dotted names.

    `*` stays within one level, `**` spans any number of levels, and a glob that matches a name takes everything
    beneath it too; a regular expression must match the whole name. A name as it stands in a tag, such as
    ``lstm[0]``, always matches itself.

    Args:
        text: The pattern; a whole tag (``Gradients/head.weight``) stands for the name in it.

    Raises:
        SelectionError: An empty pattern, or a regular expression that does not compile.

    Example:
        >>> Pattern("blocks.*.fc").matches("blocks.0.fc.weight")
        True
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.body = _TAG_PREFIX.sub("", text, count=1)
        self._regex: re.Pattern[str] | None = None
        if self.body.startswith(REGEX_PREFIX):
            try:
                self._regex = re.compile(self.body[len(REGEX_PREFIX) :])
            except re.error as error:
                raise SelectionError(f"pattern {text!r} is no valid regular expression: {error}") from None
        elif not self.body.strip(". "):
            raise SelectionError(f"pattern {text!r} is empty; '**' is every name, 'blocks.*' all under blocks")
        self._levels = self.body.split(".")
        base, self._suffix = _split_output(self.body)
        self._base_levels = base.split(".")

    def matches(self, name: str) -> bool:
        """Whether this name, or one that it lies beneath, is meant."""
        base, suffix = _split_output(name)
        if self._regex is not None:
            return self._regex.fullmatch(name) is not None or self._regex.fullmatch(base) is not None
        if name == self.body or name.startswith((self.body + ".", self.body + "[")):
            return True
        levels = base.split(".")
        if self._suffix and suffix.startswith(self._suffix) and _matches(self._base_levels, levels, whole=True):
            return True
        return _matches(self._levels, levels)

    def may_match_output_of(self, name: str) -> bool:
        """Whether the module of this name, or one of its several outputs, may be meant.

        Outputs are known only when the module has run; until then a regular expression may mean one.
        """
        if self.matches(name):
            return True
        if self._regex is not None:
            return "[" in self.text
        return bool(self._suffix) and _matches(self._base_levels, name.split("."), whole=True)


def _split_output(name: str) -> tuple[str, str]:
    """A name and what follows it in brackets: ``lstm[1][0]`` is ``lstm`` and ``[1][0]``."""
    found = _OUTPUT_SUFFIX.search(name)
    return (name[: found.start()], found.group()) if found else (name, "")


def _matches(pattern: list[str], levels: list[str], whole: bool = False) -> bool:
    """Match level by level, keeping every place in the name at which the pattern may stand."""
    places = {0}
    for part in pattern:
        if part == "**":
            places = set(range(min(places), len(levels) + 1))
        else:
            places = {
                place + 1
                for place in places
                if place < len(levels) and fnmatchcase2(_one_level(levels[place]), _one_level(part))
            }
        if not places:
            return False
    return not whole or len(levels) in places


def _one_level(part: str) -> str:
    """A level as `fnmatch2` takes it: slashes, which separate its levels, are ordinary characters in ours."""
    return part.replace("/", "\x1f").replace("\\", "\x1e")


class Patterns:
    """Includes and excludes together; the answer for each name is kept, since names come again each step.

    Args:
        include: Patterns of which one must match.
        exclude: Patterns of which none may match.

    Raises:
        SelectionError: A pattern that cannot be read.

    Example:
        >>> Patterns(["blocks.*"], ["**.bias"]).match("blocks.0.fc.bias")
        False
    """

    def __init__(self, include: Iterable[str], exclude: Iterable[str] = ()) -> None:
        self.include = tuple(Pattern(text) for text in include)
        self.exclude = tuple(Pattern(text) for text in exclude)
        self._known: dict[str, bool] = {}

    def match(self, name: str) -> bool:
        """Whether this name is selected."""
        known = self._known.get(name)
        if known is None:
            known = any(p.matches(name) for p in self.include) and not self._excludes(name)
            self._known[name] = known
        return known

    def may_match_output_of(self, name: str) -> bool:
        """Whether the module of this name, or one of its several outputs, may be selected."""
        return any(p.may_match_output_of(name) for p in self.include) and not self._excludes(name)

    def _excludes(self, name: str) -> bool:
        return any(p.matches(name) for p in self.exclude)
