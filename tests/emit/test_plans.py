"""Every kind of plan gives the unsharded model's numbers, with the planned collectives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drawn import drawn

from plans import (
    CONDITIONED,
    CONTEXTS,
    ENDS,
    EXPERTS,
    GLOBALS,
    HOSTED,
    LENGTHS,
    PHASES,
    PLANS,
    STACKS,
    STATES,
    VIDEOS,
)
from shardsim.xla import HostDevices
from shardsim.xla.host import LARGEST_ERROR

# The last gather of what experts made is transposed to a reduce-scatter, where a whole residual
# stream is planned to have its gradient summed: less moves than is planned.
SCATTERED = {"experts, tensor, replicated"}

ALL = PLANS | EXPERTS | CONTEXTS | STACKS | LENGTHS | PHASES | ENDS | CONDITIONED | GLOBALS
ALL = ALL | VIDEOS | HOSTED
EACH = 3  # of so many plans one runs every time; -m deep runs the others


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % EACH == 0 else pytest.mark.deep)
        for number, name in enumerate(ALL)
    ],
)
def test_a_plan_gives_the_numbers_of_the_unsharded_model(name: str, host: HostDevices) -> None:
    plan = ALL[name]
    result = host.compare(plan)
    assert result.loss_error <= LARGEST_ERROR
    assert result.gradient_error <= LARGEST_ERROR
    assert result.update_error <= LARGEST_ERROR
    if plan.execution == "explicit" and name not in SCATTERED:
        assert result.collectives.differences == []
        unplanned = {one.purpose for one in result.collectives.accounts if not one.planned_count}
        assert unplanned <= {"loss", "optimizer"}


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n < 3 else pytest.mark.deep) for n in range(24)]
)
def test_a_drawn_block_gives_the_numbers_of_the_unsharded_model(
    number: int, host: HostDevices
) -> None:
    result = host.compare(drawn(number))
    errors = (result.loss_error, result.gradient_error, result.update_error)
    assert max(errors) <= LARGEST_ERROR
    assert result.collectives.differences == []


# A norm of what linear attention gives divides by it, and of a first token it is a product of two
# vectors that may be near zero: float32 loses up to four digits there. In float64 twelve stay.
IN_FLOAT64 = 1e-12


@pytest.fixture(scope="session")
def wide() -> Iterator[HostDevices]:
    """Return eight host devices that compute in float64."""
    with HostDevices(8, module="run_wide") as devices:
        yield devices


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % EACH == 0 else pytest.mark.deep)
        for number, name in enumerate(STATES)
    ],
)
def test_linear_attention_gives_the_numbers_of_the_unsharded_model(
    name: str, wide: HostDevices
) -> None:
    result = wide.compare(STATES[name])
    assert result.loss_error <= IN_FLOAT64
    assert result.gradient_error <= IN_FLOAT64
    assert result.update_error <= IN_FLOAT64
    assert result.collectives.differences == []
    unplanned = {one.purpose for one in result.collectives.accounts if not one.planned_count}
    assert unplanned <= {"loss", "optimizer"}
