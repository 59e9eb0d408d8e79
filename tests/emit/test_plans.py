"""Every kind of plan gives the unsharded model's numbers, with the planned collectives."""

from __future__ import annotations

import pytest

from plans import PLANS
from shardsim.xla import HostDevices
from shardsim.xla.host import LARGEST_ERROR

# Where the emitted code does something that the planner prices otherwise, by purpose.
KNOWN = {
    "tables": "priced as gathered again in the backward pass, which needs no table again",
    "keys and values": "priced as gathered twice in a backward pass that computes attention again",
    "norm statistics": "priced with two sums where RMS norm has one, without the second axis, and "
    "without both passes of the final norm",
    "vocabulary": "priced as a reduce-scatter where the residual is whole; the sum of logits over "
    "the second axis is not priced",
    "block": "the norm after the MLP needs the MLP's output again, which is not priced",
}


_ENDS = {"tables"}
KNOWN_IN = {
    "data and fsdp": _ENDS,
    "tensor, sequence, no overlap": _ENDS,
    "tensor, embed, two directions, fused": {"norm statistics"},
    "tensor, embed, one direction": _ENDS | {"norm statistics"},
    "tensor, embed, no overlap": {"norm statistics"},
    "tensor, replicated residual, decoder": _ENDS | {"vocabulary"},
    "tensor, one key-value head": _ENDS,
    "tensor, norms after": _ENDS | {"block"},
    "2-D tensor, embed": {"norm statistics"},
    "2-D tensor, sequence": _ENDS | {"norm statistics", "vocabulary"},
    "2-D tensor, replicated": {"norm statistics"},
    "context and fsdp": _ENDS | {"keys and values"},
    "context and data": {"keys and values"},
    "context and attention pooling": {"norm statistics"},
    "class token": {"keys and values"},
    "all, microbatches": _ENDS,
}


def test_the_plans_are_many_and_of_every_kind() -> None:
    assert len(PLANS) >= 24
    assert {plan.execution for plan in PLANS.values()} == {"explicit", "partitioned"}
    assert {plan.model.family for plan in PLANS.values()} == {"vit", "decoder"}
    assert {plan.model.parallel_block for plan in PLANS.values()} == {True, False}
    assert {plan.overlap.matmul for plan in PLANS.values()} == {
        "off",
        "unidirectional",
        "bidirectional",
    }


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_gives_the_numbers_of_the_unsharded_model(name: str, host: HostDevices) -> None:
    plan = PLANS[name]
    result = host.compare(plan)
    assert result.loss_error <= LARGEST_ERROR
    assert result.gradient_error <= LARGEST_ERROR
    assert result.update_error <= LARGEST_ERROR
    if plan.execution == "explicit":
        assert not {key.purpose for key in result.differences} - KNOWN_IN.get(name, set())
