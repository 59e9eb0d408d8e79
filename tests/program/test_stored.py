"""What a derived block stores on one device is what the plan says, to the byte."""

from __future__ import annotations

from math import prod

from building import LATENTS, MODELS, plans
from hypothesis import given, settings

from shardsim.model.tensors import axes_of
from shardsim.plan import Plan, resolve
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.plan.split import activation, named, split
from shardsim.program.blocks import derived_blocks
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of

# Arrays of the graph that exported code names: the stream, the MLP and the logits.
NAMED = {"x": "residual", "up": "wide", "logits": "logits"}


@given(plans(models=(*MODELS, *LATENTS)))
@settings(max_examples=50)
def test_a_device_stores_what_the_plan_says(plan: Plan) -> None:
    layout, model = resolve(plan), plan.model
    sizes = Sizes(Workload.of(plan), layout)
    blocks = derived_blocks(model, plan.attention, kind_of(model, layout))
    derived = [*blocks.layers, blocks.ends]
    weights = {leaf.array.name: leaf.array for part in derived for leaf in part.leaves}
    weights = {name: array for name, array in weights.items() if array.weight}
    assert set(weights) == {tensor.name for tensor in model.tensors}
    element = DTYPE_BYTES[plan.precision.parameters]
    for tensor in model.tensors:
        array = weights[tensor.name]
        assert (axes_of(array.dims), array.weight) == (tensor.axes, tensor.kind)
        layers = tensor.stack // int(layout.pipeline.size) if tensor.part == "block" else 1
        shard = [int(item.size) // int(item.ways) for item in split(*named(tensor), layout)]
        assert sizes.stored(array) * layers * element == prod(shard) * element, tensor
    made = {step.op.out.name: step.op.out for part in derived for step in part.steps}
    assert {"x", "up"} <= set(made)
    for name, said in NAMED.items():
        if name in made:
            whole = activation(said, model, plan.batch, plan.sequence, layout)
            expected = prod(item.local for item in whole)
            assert sizes.stored(made[name]) * layout.microbatches == expected, name
