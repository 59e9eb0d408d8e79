"""How arrays split over devices: by hand, and arrays of layouts like their numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from building import axis_layout, build, decoder
from hypothesis import given
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.graph.place import RULES
from shardsim.model import load_model
from shardsim.plan import Plan, plan_from_data, resolve
from shardsim.plan.layout import ROLES, Layout
from shardsim.plan.optimizer import OPTIMIZERS, state_bytes
from shardsim.plan.split import dimension, stored_elements
from shardsim.planner.search import search
from shardsim.program.reductions import update
from shardsim.program.shapes import Workload
from shardsim.program.tasks import Compute

GIB = 2**30


def layout(sizes: dict[str, Any], **options: Any) -> Layout:
    return Layout(**{role: axis_layout(sizes.get(role, 1)) for role in ROLES}, **options)


@pytest.mark.parametrize(
    ("kind", "axis", "size", "sizes", "parts", "local"),
    [
        ("matrix", "embed", 1024, {"fsdp": 8, "tensor2": 4, "data": 2, "context": 2}, 32, 32),
        ("vector", "embed", 1024, {"fsdp": 8, "tensor2": 4}, 1, 1024),
        ("vector", "mlp", 4096, {"fsdp": 8, "tensor": 4}, 4, 1024),
        ("matrix", "layers", 48, {"pipeline": 4, "fsdp": 2}, 4, 12),
        # Held whole by members that share heads; the second axis then splits no further either.
        ("matrix", "kv_heads", 8, {"tensor": 16}, 1, 8),
        ("inside", "kv_heads", 3, {"tensor": 2, "tensor2": 3}, 1, 3),
        ("inside", "kv_heads", 8, {"tensor": 4, "tensor2": 4}, 4, 2),
        ("inside", "kv_heads", 8, {"tensor": 4, "tensor2": 2}, 8, 1),
        # Padded to 50,264.
        ("table", "vocab", 50257, {"tensor": 8}, 8, 6283),
        # 1,792 is 256 times 7.
        ("state", "embed", 1792, {"data": 256}, 256, 7),
        ("state", "embed", 1792, {"data": 512}, 1, 1792),
        ("state", "embed", 1792, {"data": 256, "fsdp": 2}, 2, 896),
        ("state", "embed", 1792, {"data": 128, "fsdp": 2}, 256, 7),
        ("residual", "seq", 512, {"context": 2, "tensor": 4}, 8, 64),
        ("inside", "seq", 512, {"context": 2, "tensor": 4}, 2, 256),
    ],
)
def test_dimensions_by_hand(kind, axis, size, sizes, parts, local):
    found = dimension(kind, axis, size, layout(sizes, optimizer_over_data=True))
    assert (int(found.ways), float(found.local)) == (parts, local)


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=len(ROLES), max_size=len(ROLES))


@given(
    st.lists(SIZES, min_size=1, max_size=6),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([decoder(kv_heads=4, vocab=509), decoder(heads=12, kv_heads=6, layers=150)]),
)
def test_many_layouts_split_as_each_alone(rows, residual, over_data, context_shards, model):
    def of(values: Any) -> Layout:
        return layout(
            dict(zip(ROLES, values, strict=True)),
            residual=residual,
            optimizer_over_data=over_data,
            context_shards_parameters=context_shards,
        )

    def figures(one: Layout) -> list[Any]:
        found = []
        for kind, rules in RULES.items():
            for axis in rules:
                item = dimension(kind, axis, 96, one)
                found += [item.size, item.ways, *(splits for _, splits in item.roles)]
        found += [stored_elements(model.tensors, one, state=state) for state in (False, True)]
        return found + [state_bytes(name, model.tensors, one) for name in OPTIMIZERS]

    many = [np.broadcast_to(figure, len(rows)) for figure in figures(of(np.array(rows).T))]
    for index, row in enumerate(rows):
        for all_of_them, alone in zip(many, figures(of(row)), strict=True):
            assert all_of_them[index] == alone


def vit_e(data: int, machine: str) -> Plan:
    torus = {"x": 8, "y": 8, "z": 8} if data == 512 else {"x": 4, "y": 8, "z": 8}
    model = load_model("vit-e")
    return build(
        model, machine, 16384, {"data": torus}, residual="", over_data=True, attention="unfused"
    )


def test_state_that_data_does_not_divide_is_whole_on_every_device():
    # 1,792 does not divide by 512, so each device keeps both float32 moments of all weights.
    model = load_model("vit-e")
    plan = vit_e(512, "v4:8x8x8")
    found = predict(plan)
    assert found.hbm["optimizer_bytes"] == 8 * model.parameters_all
    assert 29.2 * GIB < found.hbm["optimizer_bytes"] < 29.3 * GIB
    assert not found.fits
    assert any("1,792 does not divide by 512" in text for text in found.warnings)
    # Gradients are then summed, not scattered, and no updated parameters are gathered.
    assert {use.kind for use in found.collectives} == {"all-reduce"}
    halved = predict(vit_e(256, "v4:4x8x8"))
    vectors = sum(tensor.size for tensor in model.tensors if tensor.kind == "vector")
    matrices = model.parameters_all - vectors
    assert halved.hbm["optimizer_bytes"] == 8 * (matrices / 256 + vectors)
    assert halved.fits
    assert not any("divide" in text for text in halved.warnings)
    kinds = {use.kind for use in halved.collectives}
    assert kinds == {"all-reduce", "reduce-scatter", "all-gather"}


@pytest.mark.slow
def test_the_search_offers_no_state_split_that_does_not_happen():
    result = search("vit-e", "v4:8x8x8", 16384, top=15, max_axes=2)
    assert len(result.predictions) > 10
    for found in result.predictions:
        assert found.fits
        sizes = resolve(found.plan)
        whole = 8 * stored_elements(found.plan.model.tensors, sizes)
        assert (found.hbm["optimizer_bytes"] < whole) == bool(found.plan.optimizer_rules)
        assert int(sizes.data.size) < 512


def test_an_optimizers_own_weights_lie_as_its_state_does() -> None:
    plan = plan_from_data(
        {
            "model": "llama2-7b",
            "machine": "v5p:2x2x2",
            "batch": 8,
            "mesh": {"data": 8},
            "rules": {"activations": {"batch": ["data"]}, "optimizer": {"embed": ["data"]}},
            "precision": {"parameters": "bf16", "master": "f32"},
        },
        "plan",
    )
    plain = replace(plan, precision=replace(plan.precision, master=""))
    more = predict(plan).hbm["optimizer_bytes"] / predict(plain).hbm["optimizer_bytes"]
    assert more == pytest.approx(1.5)
    # The update reads and writes what is state, and then writes parameters without reading them.
    (mine,), (other,) = (update(Workload.of(one), resolve(one)).tasks for one in (plan, plain))
    master, read = (plan.model.parameters * width / 8 for width in (4, 2))
    assert isinstance(mine, Compute)
    assert isinstance(other, Compute)
    assert mine.hbm_bytes - other.hbm_bytes == pytest.approx(2 * master - read, rel=1e-3)
    with pytest.raises(PlanError, match=r"precision.master: bf16 is no wider"):
        replace(plan.precision, master="bf16").check()
