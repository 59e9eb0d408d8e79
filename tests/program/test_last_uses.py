"""What leaves HBM late in the backward pass, and what gradients of attention have beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import build, decoder, vit

from shardsim.graph.place import Kind
from shardsim.plan import resolve
from shardsim.program.holds import HOLDS
from shardsim.program.liveness import Mode, layer_trace
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes
from shardsim.program.trace import Live, Measure, Trace

EMITTED = HOLDS["emitted"]


def traced(model, attention="unfused", mode=None, kind=None, **changes) -> Trace:
    passes, kind = replace(EMITTED, **changes), kind or Kind()
    return layer_trace(model, attention, 0, kind, frozenset(), passes, mode or Mode())


def named(trace: Trace) -> dict[str, Live]:
    return {array.name: array for array in trace.arrays}


def at(trace: Trace, label: str) -> set[str]:
    moment = trace.labels.index(label)
    return {one.name for one in trace.arrays if one.born <= moment <= one.last and one.times}


@pytest.mark.parametrize("tokens", [197, 256, 257, 2048])
def test_statistics_of_rows_are_turned_if_they_fill_more_than_two_rows_of_lanes(tokens):
    model = vit()
    trace = traced(model, "flash")
    plan = build(model, "v4:2x2x1", 8, {"fsdp": {"x": 2, "y": 2}}, sequence=tokens)
    measure = Measure(Sizes(Workload.of(plan), resolve(plan)), 2.0, 2.0, tiled="kernel")
    kept, turned = (named(trace)[f"context, {n}"] for n in ("statistics", "statistics, turned"))
    assert kept.last == turned.born == turned.last
    assert trace.labels[kept.last] == "context gradient, of its statistics"
    assert measure(turned.size) == (measure(kept.size) if tokens > 256 else 0.0)
    assert "context, statistics" not in at(trace, "context gradient")


@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_an_mlp_behind_attention_waits_for_its_gradients(attention):
    """What the last product's gradient reads waits with prefetching alone."""
    model = decoder(gated_mlp=False, activation="gelu")
    last = "scores gradient" if attention == "unfused" else "context gradient"
    ahead, at_once = (traced(model, attention, Mode(prefetch=one)) for one in (True, False))
    assert {"up", "d hidden"} <= at(ahead, last)
    assert "d hidden" in at(at_once, last)
    assert "up" not in at(at_once, last)
    assert not {"up", "d hidden"} & at(traced(model, attention, mlp_waits=False), last)


@pytest.mark.parametrize("lead", [False, True])
def test_without_prefetching_scores_meet_one_hidden_layer_of_a_parallel_block_at_most(lead):
    trace = traced(vit(), mode=Mode(prefetch=False, quiet=True, scores_lead=lead))
    there = named(trace)
    scores, hidden, gradient = (there[name] for name in ("probabilities", "up", "d hidden"))
    assert (hidden.born <= scores.last) == (not lead)
    assert gradient.born > scores.last


def test_without_prefetching_no_gradient_of_weights_is_carried_to_the_next_layer():
    def first(prefetch: bool) -> set[str]:
        trace = traced(decoder(), "flash", Mode(prefetch=prefetch))
        return {one for one in at(trace, "enter") if one.endswith(", whole")}

    assert first(True)
    assert not first(False)


def test_queries_gradient_is_made_before_that_of_keys_and_in_float32_if_they_are_rotated():
    trace = traced(decoder())
    queries, keys = at(trace, "scores gradient"), at(trace, "scores gradient, of k turned")
    reads_keys = [any(one.startswith("k turned") for one in there) for there in (queries, keys)]
    assert "d q turned" in queries
    assert "d k turned" not in queries
    assert {"d q turned", "d k turned", "q turned"} <= keys
    assert reads_keys == [True, False]
    widths = {name: named(trace)[f"d {name}"].size.width for name in ("q turned", "k turned", "v")}
    assert widths == {"q turned": 4.0, "k turned": 4.0, "v": "wire"}
    fused = named(traced(decoder(), "flash"))
    assert fused["d q turned"].size.width == "wire"


@pytest.mark.parametrize("model", [decoder(), vit()], ids=["serial", "parallel"])
def test_where_permutes_wait_whole_arrays_are_put_together_beside_their_pieces(model):
    mode, kind = Mode("sequence", rows=True), Kind(residual=1)
    soon, late = (
        traced(model, mode=replace(mode, waits=waits), kind=kind) for waits in (False, True)
    )
    moment = "whole arrays are put together"
    assert moment not in soon.labels
    assert late.labels[-1] == moment
    there = at(late, moment)
    streams = {"block input", "d y"} if model.parallel_block else {"attention input", "d mlp"}
    for name in streams:
        assert {f"{name}, whole", f"{name}, whole, in pieces"} <= there
