"""Where a graph's arrays are stored is where the plan's weights are."""

from __future__ import annotations

import pytest
from building import plans
from hypothesis import given

from shardsim.model.tensors import axes_of
from shardsim.plan import Plan, resolve
from shardsim.plan.split import stored_elements
from shardsim.program.blocks import derived_blocks
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of


@given(plans())
def test_a_device_stores_of_each_weight_what_the_plan_says(plan: Plan) -> None:
    layout, model = resolve(plan), plan.model
    sizes = Sizes(Workload.of(plan), layout)
    blocks = derived_blocks(model, plan.attention, kind_of(model, layout))
    stack, ends = blocks.layers[0].leaves, blocks.ends.leaves
    weights = {leaf.array.name: leaf.array for leaf in (*stack, *ends) if leaf.array.weight}
    assert set(weights) == {tensor.name for tensor in model.tensors}
    for tensor in model.tensors:
        array = weights[tensor.name]
        assert (axes_of(array.dims), array.weight) == (tensor.axes, tensor.kind)
        layers = tensor.stack / float(layout.pipeline.size) if tensor.part == "block" else 1
        expected = float(stored_elements([tensor], layout))
        assert float(sizes.stored(array)) * layers == pytest.approx(expected, rel=1e-12), tensor
