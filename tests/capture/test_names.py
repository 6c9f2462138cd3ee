"""Names of modules and parameters: wrappers, ties, containers, and what is near a glob without a match."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from instrument import SelectionError
from instrument.capture.names import check_selection, named_modules, select
from instrument.capture.patterns import Patterns
from instrument.config import KINDS


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.body = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.emb.weight


def names(
    model: nn.Module, include: str = "**", exclude: tuple[str, ...] = (), kinds: tuple[str, ...] = KINDS
) -> list[str]:
    selection = select(model, Patterns([include], exclude), kinds)
    return [entry.name for entry in selection.modules] + [entry.name for entry in selection.parameters]


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def test_the_root_is_shown_as_its_class() -> None:
    """The root has the name of its class; parameters of its own have none in front."""
    assert names(nn.Linear(2, 1)) == ["Linear", "weight", "bias"]


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled,
        lambda model: nn.DataParallel(compiled(model)),
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["DataParallel", "compile", "both", "AveragedModel"],
)
def test_wrappers_leave_no_trace_in_names(wrap: object) -> None:
    """Wrapped, a model has the names it has unwrapped, the root's class among them."""
    assert callable(wrap)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert names(wrap(model)) == names(model) == ["Sequential", "0", "1", "0.weight", "0.bias"]


def test_the_outermost_wrapper_is_the_one_that_is_called() -> None:
    """Of a wrapper and what it wraps, which share a name, the wrapper stands."""
    inner = nn.Linear(2, 2)
    outer = nn.DataParallel(inner)
    assert named_modules(outer)[0].module is outer
    model = nn.Sequential(compiled(inner))
    assert named_modules(model)[1].module is model[0]
    assert names(model) == ["Sequential", "0", "0.weight", "0.bias"]


def test_a_child_called_module_beside_others_keeps_its_name() -> None:
    """A child that happens to be called `module` is no wrapper part where it has siblings."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    assert "module.weight" in names(model)


def test_tied_parameters_are_found_under_each_name_and_taken_once() -> None:
    """A tied weight is selected under the first of its names that matches, and only once."""
    model = Tied()
    assert names(model, kinds=("parameters",)).count("emb.weight") == 1
    assert "lm_head.weight" not in names(model)
    assert names(model, "lm_head.*", kinds=("gradients",)) == ["lm_head.weight"]
    selection = select(model, Patterns(["**"]), KINDS)
    assert selection.aliases == {"lm_head.weight": "emb.weight"}


def test_a_shared_module_is_found_under_each_name_and_taken_once() -> None:
    """A module in two places is selected once, under the first name that matches."""
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert names(model) == ["a", "a.weight", "a.bias"]
    assert names(model, "b") == ["b", "b.weight", "b.bias"]


def test_containers_are_never_selected_as_modules() -> None:
    """A `ModuleList` cannot be called and so yields no activations; what it holds does."""
    assert names(Tied(), "body", kinds=("activations",)) == ["body.0", "body.1"]


def test_globs_and_excludes_select_as_documented() -> None:
    """`include="blocks.*", exclude="blocks.*.*"` is the blocks' own outputs."""
    blocks = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1)))
    model = nn.ModuleDict({"blocks": blocks})
    assert names(model, "blocks.*", ("blocks.*.*",), ("activations",)) == ["blocks.0", "blocks.1"]


def test_parametrized_names_are_the_real_ones_and_nothing_is_computed() -> None:
    """Under spectral norm the real parameter is named, and naming it runs no power iteration."""
    layer: Any = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = layer.parametrizations.weight[0]._u.clone()
    assert "parametrizations.weight.original" in names(layer, kinds=("parameters",))
    assert torch.equal(before, layer.parametrizations.weight[0]._u)


def test_a_module_that_holds_itself_ends() -> None:
    """A cycle among modules does not send the walk round and round."""
    model = nn.Linear(1, 1)
    model._modules["again"] = model
    assert names(model) == ["Linear", "weight", "bias"]


def test_a_glob_without_a_match_is_refused_with_the_nearest_names() -> None:
    """A misspelt glob is told with the nearest names of the model."""
    with pytest.raises(SelectionError, match=re.escape("include='lm_haed' matches no name; nearest: 'lm_head'")):
        check_selection(Tied(), Patterns(["lm_haed"]), KINDS)
    with pytest.raises(
        SelectionError, match=re.escape("include='transformer.*' matches no name; the model has 'Tied', 'emb'")
    ):
        check_selection(Tied(), Patterns(["emb", "transformer.*"]), KINDS)
    with pytest.raises(SelectionError, match="nearest: 'body'"):
        check_selection(Tied(), Patterns(["BODY.*"]), KINDS)


def test_an_exclude_without_a_match_is_noted() -> None:
    """An exclude that matches nothing is a note, since it harms nobody."""
    _, notes = check_selection(Tied(), Patterns(["**"], ["dropout.*"]), KINDS)
    assert notes == [
        "exclude='dropout.*' matches no name and does nothing; the model has 'Tied', 'emb', 'body', 'body.0', "
        "'body.1', 'lm_head', ..."
    ]


def test_nothing_left_is_refused_with_what_was_asked() -> None:
    """A selection left empty is told with includes, excludes and kinds, and with the container it names."""
    with pytest.raises(SelectionError, match=re.escape("include='**', exclude='**', kinds=parameters")):
        check_selection(Tied(), Patterns(["**"], ["**"]), ("parameters",))
    with pytest.raises(SelectionError, match="'body' is a container, which is never called itself"):
        check_selection(Tied(), Patterns(["body"], ["body.*"]), ("activations",))


def test_an_include_of_another_kind_is_noted() -> None:
    """An include that means modules only, where only parameters are watched, is noted."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    _, notes = check_selection(model, Patterns(["0", "1"]), ("parameters",))
    assert notes == ["include='1' matches names, but none is left to watch: kinds or an exclude rule them out"]
