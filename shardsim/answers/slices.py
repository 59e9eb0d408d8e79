"""Which slice: the best plan of each, the smallest that fits, and what no other slice beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardsim.answers.training import Training
from shardsim.cost.predict import Prediction
from shardsim.errors import HardwareError
from shardsim.machine import Machine, default_slice, load_chip, parse_machine
from shardsim.planner.found import OfSlice
from shardsim.units import show_bytes

ALL = ":*"
MOST_CHIPS = 4096  # of `v5p:*`


def slices_named(text: str) -> list[Machine]:
    """Return the slices that a list with commas names; `v5p:*` are those of 1, 2, 4, ... chips.

    >>> [machine.name for machine in slices_named("v4-8, v5e:*")][:4]
    ['v4:2x2x1', 'v5e:1x1', 'v5e:2x2', 'v5e:2x4']
    """
    found: dict[str, Machine] = {}
    for part in text.split(","):
        name = "".join(part.split())
        if name.endswith(ALL):
            every = _sizes(name.removesuffix(ALL))
        else:
            every = [parse_machine(part)] if name else []
        found |= {machine.name: machine for machine in every}
    if not found:
        raise HardwareError("no slice is named; write v4:8x8x16, v5e-256 or v5p:*")
    return list(found.values())


def _sizes(name: str) -> list[Machine]:
    chip, found = load_chip(name), []
    for power in range(MOST_CHIPS.bit_length()):
        try:
            found.append(default_slice(chip, 2**power))
        except HardwareError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One slice: its fastest plan, and whether some other slice is as good in all that counts."""

    machine: Machine
    best: Prediction | None
    why_not: str  # where there is none
    price: float  # chip-seconds of a step, times the price of a chip-second where there is one
    on_front: bool  # no other is as fast, as cheap and as small
    smallest: bool  # the fewest chips on which a plan fits

    def to_data(self, training: Training | None) -> dict[str, Any]:
        """Return it as plain data."""
        item = self.best
        data: dict[str, Any] = {
            "machine": self.machine.name,
            "chips": self.machine.chips,
            "fits": item is not None,
            "why_not": self.why_not or None,
            "step_time_s": None if item is None else item.step_time_s,
            "mfu": None if item is None else item.mfu,
            "hbm_peak_bytes": None if item is None else item.hbm["peak_bytes"],
            "on_front": self.on_front,
            "smallest": self.smallest,
        }
        if training is not None and item is not None:
            data["training"] = training.to_data(item)
        return data


def choices(slices: Sequence[OfSlice], training: Training | None = None) -> list[Choice]:
    """Return the slices of a search, in its order, with what no other beats: step time, cost and
    chips. Without prices the cost is in chip-seconds, whatever the chips are."""
    points: dict[int, tuple[float, float, int]] = {}
    for index, one in enumerate(slices):
        if one.best is not None:
            price = _price(one.best, training)
            points[index] = one.best.step_time_s, price, one.machine.chips
    fewest = min((chips for _, _, chips in points.values()), default=0)
    return [
        Choice(
            machine=one.machine,
            best=one.best,
            why_not="" if one.best else _why_not(one),
            price=points[index][1] if index in points else 0.0,
            on_front=index in points
            and not any(_beats(other, points[index]) for other in points.values()),
            smallest=index in points and one.machine.chips == fewest,
        )
        for index, one in enumerate(slices)
    ]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether one is nowhere worse than another, and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _price(item: Prediction, training: Training | None) -> float:
    cost = None if training is None else training.cost(item)
    return item.step_time_s * item.plan.machine.chips if cost is None else cost


def _why_not(one: OfSlice) -> str:
    if one.searched == 0:
        return "no legal plan"
    device = show_bytes(one.machine.chip.hbm_usable_bytes_per_device)
    return f"needs {show_bytes(one.smallest_peak_bytes)} of {device}"
