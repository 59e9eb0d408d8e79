"""What divides what, and what is said when it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from building import axis_layout, build, decoder
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import PlanError
from shardsim.plan import resolve
from shardsim.plan.layout import Layout
from shardsim.plan.legality import check, legal

X, Y = {"x": 4}, {"y": 4}


@pytest.mark.parametrize(
    ("model", "where", "options", "words"),
    [
        ({}, {"data": X, "fsdp": Y}, {"batch": 24}, ["batch", "24", "16", "16 and 32"]),
        ({}, {"data": X, "fsdp": Y}, {"batch": 16, "microbatches": 2}, ["batch", "32"]),
        ({"sequence": 510}, {"context": X, "fsdp": Y}, {}, ["sequence", "510", "4"]),
        ({"heads": 6, "kv_heads": 6}, {"tensor": X, "fsdp": Y}, {}, ["heads", "6", "4"]),
        ({"mlp": 4098}, {"tensor": X, "fsdp": Y}, {}, ["MLP", "4098"]),
        ({"heads": 12, "kv_heads": 3}, {"tensor": {"x": 2}, "fsdp": {"x": 2, "y": 4}}, {}, ["key"]),
        ({"embed": 1022}, {"fsdp": X, "data": Y}, {}, ["embed", "1022"]),
        ({"embed": 1022}, {"tensor2": X, "data": Y}, {}, ["embed", "1022"]),
        ({"sequence": 510}, {"tensor": X, "data": Y}, {}, ["tokens", "510"]),
        ({"embed": 1022}, {"tensor": X, "data": Y}, {"residual": "embed"}, ["embed", "1022"]),
        ({"layers": 6}, {"pipeline": X, "data": Y}, {"microbatches": 4}, ["layers", "6"]),
        ({}, {"pipeline": X, "data": Y}, {"microbatches": 2}, ["microbatches", "4 pipeline"]),
        ({}, {"pipeline": X, "data": Y}, {"microbatches": 4, "pipeline_interleave": 3}, ["layers"]),
    ],
)
def test_what_does_not_divide_is_refused(model, where, options, words):
    options = {"batch": 64} | options
    plan = build(decoder(**model), "v5e:4x4", options.pop("batch"), where, **options)
    with pytest.raises(PlanError) as caught:
        check(plan, resolve(plan))
    for word in words:
        assert word in str(caught.value)
    assert not legal(plan.model, plan.batch, plan.sequence, resolve(plan), plan.pipeline_interleave)


@pytest.mark.parametrize(
    ("model", "where", "options"),
    [
        # The same with what matters mended.
        ({"sequence": 510}, {"context": {"x": 2}, "fsdp": {"x": 2, "y": 4}}, {}),
        ({"sequence": 510}, {"tensor": X, "data": Y}, {"residual": "embed"}),
        ({"sequence": 510}, {"tensor": X, "data": Y}, {"residual": ""}),
        ({"embed": 1022}, {"tensor": X, "data": Y}, {}),
        ({"heads": 12, "kv_heads": 3}, {"tensor": X, "fsdp": Y}, {}),  # each head copied
        ({"layers": 6}, {"pipeline": {"x": 2}, "data": {"x": 2, "y": 4}}, {"microbatches": 2}),
    ],
)
def test_what_divides_is_accepted(model, where, options):
    plan = build(decoder(**model), "v5e:4x4", 64, where, **options)
    check(plan, resolve(plan))


ROLES = ("pipeline", "data", "fsdp", "expert", "context", "tensor2", "tensor")


@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=7, max_size=7), min_size=1),
    st.sampled_from([12, 16, 96]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 1, 2]),
)
def test_arrays_are_legal_where_their_numbers_are(rows, batch, microbatches, residual):
    model = decoder(embed=1536, heads=12, kv_heads=12, layers=6)
    columns = np.array(rows).T

    def layout(values: Any) -> Layout:
        axes = dict(zip(ROLES, (axis_layout(value) for value in values), strict=True))
        return Layout(**axes, microbatches=microbatches, residual=residual)

    many = np.broadcast_to(legal(model, batch, 512, layout(columns)), len(rows))
    for index, row in enumerate(rows):
        assert bool(many[index]) == bool(legal(model, batch, 512, layout(row)))


def test_an_axis_without_work_is_refused():
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": X, "tensor": Y})
    idle = replace(plan, parameters={}, activations={"batch": ("f",)})
    with pytest.raises(PlanError, match=r"mesh\.t: no rule gives this axis work"):
        resolve(idle)


def test_an_axis_of_stages_without_work_is_told_its_rule():
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": X, "tensor": Y})
    mesh = tuple(replace(axis, name={"t": "stage"}.get(axis.name, axis.name)) for axis in plan.mesh)
    idle = replace(plan, mesh=mesh, parameters={}, activations={"batch": ("f",)})
    with pytest.raises(PlanError, match=r"rules\.parameters\.layers: \[stage\]$"):
        resolve(idle)


@pytest.mark.parametrize(
    ("parameters", "activations", "words"),
    [
        ({"heads": ("t",)}, {"batch": ("f",)}, "mlp: must name 't' too"),
        ({"heads": ("t",), "mlp": ("t",)}, {"batch": ("f", "t")}, "an axis can serve only one"),
        (
            {"heads": ("t",), "mlp": ("t",)},
            {"batch": ("f",), "seq": ("t",), "embed": ("t",)},
            "splits seq or embed, not both",
        ),
    ],
)
def test_rules_without_a_meaning_are_refused(parameters, activations, words):
    plan = build(decoder(), "v5e:4x4", 64, {"fsdp": X, "tensor": Y})
    with pytest.raises(PlanError, match=words):
        resolve(replace(plan, parameters=parameters, activations=activations))
