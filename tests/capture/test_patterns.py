"""Globs over names, against a second implementation by regular expressions."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrument import SelectionError
from instrument.capture.patterns import Pattern, Patterns


def agrees(glob: str, name: str) -> bool:
    """The same glob as one regular expression over levels that end in dots: an independent reading of the rules."""
    expression = ""
    for level in glob.split("."):
        if level == "**":
            expression += r"(?:[^.]+\.)*"
        else:
            expression += re.escape(level).replace(r"\*", "[^.]*").replace(r"\?", "[^.]") + r"\."
    return re.match(expression, name + ".") is not None


NAMES = st.lists(st.sampled_from(["a", "b", "norm", "x1", "weight", "0", "12"]), min_size=1, max_size=5).map(".".join)
LEVELS = st.sampled_from(["a", "b", "norm", "weight", "0", "*", "**", "?", "x*", "*m", "1?"])
GLOBS = st.lists(LEVELS, min_size=1, max_size=5).map(".".join)


@settings(max_examples=2000, deadline=None)
@given(GLOBS, NAMES)
def test_globs_agree_with_regular_expressions(glob: str, name: str) -> None:
    """Any glob matches any name exactly when its translation into a regular expression does."""
    assert Pattern(glob).matches(name) == agrees(glob, name)


CASES = [
    ("**", "anything.at.all", True),
    ("blocks.*", "blocks.0", True),
    ("blocks.*", "blocks.0.sa.key.weight", True),
    ("blocks.*", "blocks", False),
    ("blocks.*.*", "blocks.0", False),
    ("blocks.*.*", "blocks.0.sa", True),
    ("**.weight", "blocks.0.sa.key.weight", True),
    ("**.weight", "weight", True),
    ("**.weight", "blocks.0.weight_g", False),
    ("**.norm.weight", "a.norm.x.norm.weight", True),
    ("**.a.**.b.**.c", "a.x.b.y.a.b.c", True),
    ("fc1", "fc10", False),
    ("fc?", "fc1.weight", True),
    ("fc[12]", "fc2", True),
    ("fc[!12]", "fc2", False),
    ("FC1", "fc1", False),
    ("lstm[0]", "lstm[0]", True),
    ("lstm[0]", "lstm[0][1]", True),
    ("lstm[0]", "lstm[1]", False),
    ("lstm[0]", "lstm", False),
    ("lstm", "lstm[0]", True),
    ("layers.*[logits]", "layers.3[logits]", True),
    ("layers.*[logits]", "layers.3[loss]", False),
    ("re:blocks\\.[0-3]\\..*", "blocks.2.sa", True),
    ("re:blocks\\.[0-3]\\..*", "blocks.5.sa", False),
    ("re:blocks", "blocks.0", False),
    ("re:lstm", "lstm[0]", True),
    ("Gradients/head.weight", "head.weight", True),
    ("Gradients.rms/head.weight", "head.weight", True),
    ("Other/head.weight", "head.weight", False),
    ("a/b", "a/b", True),
    ("a*", "a/b", True),
    ("*", "top", True),
    ("**.**.**.**.**.**.**.**.**.x", ".".join("abcdefghijklmnop" * 8), False),
]


@pytest.mark.parametrize(("glob", "name", "expected"), CASES)
def test_globs_by_example(glob: str, name: str, expected: bool) -> None:
    """The rules of the design, one example each; many `**` cost no time."""
    assert Pattern(glob).matches(name) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lstm[0]", "lstm", True),
        ("lstm[0]", "lstm2", False),
        ("enc.*[0]", "enc.3", True),
        ("re:.*\\[logits\\]", "head", True),
        ("re:head", "body", False),
    ],
)
def test_an_output_not_yet_seen_may_be_meant(pattern: str, name: str, expected: bool) -> None:
    """A module is kept in view where one of its several outputs may be meant, though it has not run yet."""
    assert Pattern(pattern).may_match_output_of(name) is expected


def test_excludes_win_over_includes() -> None:
    """What an exclude matches is out, whatever includes say."""
    patterns = Patterns(["blocks.*"], ["blocks.*.*"])
    assert patterns.match("blocks.0")
    assert not patterns.match("blocks.0.sa")
    assert not patterns.match("head")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("re:(", "pattern 're:\\(' is no valid regular expression"), (".", "pattern '\\.' is empty; '\\*\\*' is every")],
)
def test_a_pattern_that_cannot_be_read_is_refused(pattern: str, words: str) -> None:
    """A broken regular expression and an empty glob are refused with the reason."""
    with pytest.raises(SelectionError, match=words):
        Pattern(pattern)
