"""Single transfers of the rule, on paper."""

from __future__ import annotations

import pytest

from shardsim.graph.arrays import Array, Op
from shardsim.graph.derive import derive, gathered
from shardsim.graph.place import SEQUENCE_SHARDED, Kind, placed

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


def test_what_reads_neighbours_takes_their_rim_and_sends_its_gradient_back():
    x = Array("x", ("batch", "seq", "embed"), stream=True)
    op = Op((x,), Array("y", x.dims, stream=True), (x,), reach=("seq", "rim"), reached=("x",))
    kind = Kind(residual=SEQUENCE_SHARDED)
    (step,) = derive(placed((op,), kind), kind.axes).steps
    (rim,) = step.gathers
    assert (rim.kind, rim.axes) == ("permute", {"context", "tensor"})
    assert rim.dims == ("batch", "rim", "embed")
    # Backward it is read again, and what the neighbours' results add to it comes back.
    assert [(move.kind, move.gradient) for move in step.gradient_gathers] == [
        ("permute", False),
        ("permute", True),
    ]
