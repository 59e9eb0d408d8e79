"""Single transfers of the rule, on paper."""

from __future__ import annotations

import pytest

from shardsim.graph.arrays import Array
from shardsim.graph.derive import gathered

X = Array("x", ("batch", "embed"), split={"a": "embed"})


@pytest.mark.parametrize(
    ("place", "kind", "by"),
    [
        ({}, "all-gather", ()),  # wanted whole
        ({"b": "batch"}, "all-gather", (("b", "batch"),)),  # each wants its rows: sliced first
        ({"b": "embed"}, "all-gather", ()),  # no slice along what is gathered before it is whole
        ({"a": "batch"}, "all-to-all", (("a", "embed"),)),  # split another way
        ({"a": "batch", "b": "embed"}, "all-to-all", (("a", "embed"),)),
    ],
)
def test_what_an_op_wants_otherwise_is_moved_once(place, kind, by):
    (move,) = gathered(X, place)
    assert (move.kind, move.axes, move.dims, move.by) == (kind, {"a"}, X.dims, by)


@pytest.mark.parametrize("place", [{"a": "embed"}, {"a": "embed", "b": "batch"}])
def test_what_lies_as_wanted_is_not_moved(place):
    assert gathered(X, place) == []
