"""Groups of several roles, from plans: their members and how far apart they are."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
from building import build, decoder

from shardsim.plan import Plan, resolve


def members(plan: Plan, roles: str) -> list[list[int]]:
    """Return the places along x of the devices that differ in `roles` only, mesh by hand."""
    factors = [(axis.name, axis.torus.get("x", 1)) for axis in plan.mesh]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in product(*(range(factor) for _, factor in factors)):
        place = 0
        for (_, factor), step in zip(factors, index, strict=True):
            place = place * factor + step
        key = tuple(
            step for (name, _), step in zip(factors, index, strict=True) if name not in roles
        )
        groups.setdefault(key, []).append(place)
    return list(groups.values())


@pytest.mark.parametrize(
    ("where", "shards", "roles", "group"),
    [
        ({"fsdp": {"x": 2}, "context": {"x": 4}, "data": {"y": 8}}, True, "fc", "gather"),
        ({"fsdp": {"x": 2}, "context": {"x": 4}, "data": {"y": 8}}, False, "f", "gather"),
        ({"data": {"x": 2}, "context": {"x": 4}, "fsdp": {"y": 8}}, False, "dc", "replicas"),
        ({"data": {"x": 4}, "context": {"x": 2}, "fsdp": {"y": 8}}, True, "d", "replicas"),
        ({"fsdp": {"x": 2}, "tensor": {"x": 4}, "data": {"y": 8}}, True, "f", "gather"),
        ({"fsdp": {"x": 2}, "context": {"x": 2}, "tensor": {"x": 2, "y": 8}}, True, "fc", "gather"),
        ({"data": {"x": 2}, "fsdp": {"x": 4, "y": 8}}, True, "d", "replicas"),
    ],
)
def test_strides_along_an_axis(where, shards, roles, group):
    model = decoder(embed=2048)
    plan = build(model, "v5e:8x8", 64, where, context_shards=shards)
    layout = resolve(plan).role(group)
    found = members(plan, roles)
    sizes = {len(places) for places in found}
    gaps = {after - before for places in found for before, after in pairwise(places)}
    assert sizes == {int(layout.factors[0])}
    assert gaps == {int(layout.strides[0])}


@pytest.mark.parametrize("residual", ["", "seq", "embed"])
@pytest.mark.parametrize("shards", [False, True])
def test_what_groups_of_several_roles_are_made_of(residual, shards):
    where = {
        "pipeline": {"dcn": 2},
        "data": {"x": 2},
        "fsdp": {"x": 4},
        "context": {"y": 2},
        "tensor2": {"y": 4},
        "tensor": {"z": 8},
    }
    plan = build(
        decoder(heads=64, kv_heads=64), "2*v4:8x8x8", 64, where,
        residual=residual, context_shards=shards, microbatches=2,
    )  # fmt: skip
    sizes = {"d": 2, "f": 4, "c": 2, "u": 4, "t": 8, "p": 2}
    for group, names in {
        "gather": "fc" if shards else "f",
        "replicas": "d" if shards else "dc",
        "tokens": "ct" if residual == "seq" else "c",
        "embed": "ut" if residual == "embed" else "u",
        "tensor_peers": "dfcu",
        "stage": "dfcut",
        "data+pipeline": "dp",
    }.items():
        assert resolve(plan).mesh_axes(group) == tuple(names)
        assert int(resolve(plan).role(group).size) == prod(sizes[name] for name in names)
    with pytest.raises(KeyError):
        resolve(plan).role("rows")


def test_groups_share_links_only_on_common_axes():
    plan = build(decoder(), "v5e:8x8", 64, {"fsdp": {"x": 8}, "tensor": {"y": 8}})
    layout = resolve(plan)
    assert not layout.fsdp.shares_links_with(layout.tensor)
    plan = build(decoder(), "v5e:8x8", 64, {"fsdp": {"x": 8, "y": 2}, "tensor": {"y": 4}})
    layout = resolve(plan)
    assert layout.fsdp.shares_links_with(layout.tensor)
