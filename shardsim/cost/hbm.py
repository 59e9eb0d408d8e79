"""HBM over the step: what is in it when it peaks, and whether the plan fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from shardsim.cost.account import Account, Held
from shardsim.cost.stays import measure_of
from shardsim.machine import Machine
from shardsim.plan.layout import Layout, Number
from shardsim.program.holds import Passes
from shardsim.program.shapes import Workload

MOMENTS = ("first layer of the backward pass", "output head")
FORWARD_MOMENTS = ("layers", "output head")  # where there is no backward pass


@dataclass(frozen=True, kw_only=True)
class HbmUse:
    """HBM of one device over the step, in bytes.

    `at[i]` is what is in use at `MOMENTS[i]`. Parameters and optimizer state are always there.
    Before the backward pass starts every layer's kept activations are there; as it starts, room
    for all gradients is taken, and the first layer it reaches needs its weights and workspace.
    """

    capacity_bytes: float
    parameters_bytes: Number
    optimizer_bytes: Number
    gradients_bytes: Number
    activations_bytes: Number
    at: tuple[Number, Number]
    thrifty_bytes: Number  # what a program that spends as little as it can reserves
    host_bytes: Number  # what the plan keeps in the host's memory
    host_capacity_bytes: float  # a device's share of it; infinite where that is not known
    account: Account = field(repr=False)

    @cached_property
    def peak_bytes(self) -> Number:
        """The largest use over the step."""
        return np.maximum(*self.at)

    @property
    def workspace_bytes(self) -> Number:
        """What is there at the peak besides: gathered weights and live intermediates."""
        rest = self.parameters_bytes + self.optimizer_bytes + self.activations_bytes
        return np.maximum(self.peak_bytes - rest - self.gradients_bytes, 0.0)

    @cached_property
    def lavish_bytes(self) -> Number:
        """What is reserved where memory is plentiful, gaps between buffers included."""
        passes = self.account.passes
        most = np.maximum(*replace(self.account, passes=passes.most).at)
        return np.maximum(most, self.peak_bytes) * (1.0 + passes.gaps)

    @property
    def recomputed(self) -> Number:
        """Whether it fits only as the compiler recomputes by itself what layers keep."""
        return np.greater(self.recomputed_share, 0.0) if self.account.passes.recomputes else False

    @property
    def recomputed_share(self) -> Number:
        """The share of what layers keep that the compiler drops until the rest fits, 0 to 1."""
        passes = self.account.passes
        if not passes.recomputes or passes.scarce is None:
            return 0.0
        kept = np.maximum(*_least(self.account))
        dropped = np.maximum(*_least(replace(self.account, layout=dropping(self.account.layout))))
        over = np.maximum(kept - self.capacity_bytes, 0.0)
        return np.minimum(over / np.maximum(kept - dropped, 1.0), 1.0) * self.fits

    @property
    def fits(self) -> Number:
        """Whether what is needed at least is within what the compiler and the host offer."""
        return np.less_equal(self.thrifty_bytes, self.capacity_bytes) & self.host_fits

    @property
    def hides(self) -> Number:
        """Whether layers leave the compiler's scheduler memory to hide collectives in."""
        return np.less_equal(self.at[0], self.account.passes.hides_up_to * self.capacity_bytes)

    @property
    def host_fits(self) -> Number:
        """Whether what lies in the host's memory has room there."""
        return np.less_equal(self.host_bytes, self.host_capacity_bytes)

    @property
    def moments(self) -> tuple[str, str]:
        """What the moments of `at` are called."""
        return FORWARD_MOMENTS if self.account.work.forward_only else MOMENTS

    @property
    def peak_moment(self) -> str:
        """When a single plan's HBM peaks."""
        return self.moments[int(np.argmax([float(use) for use in self.at]))]

    @property
    def at_peak(self) -> tuple[Held, ...]:
        """What a single plan's HBM holds at its peak, largest first; their sum is `peak_bytes`."""
        moment = int(np.argmax([float(use) for use in self.at]))
        found = self.account.listed(moment, float(self.peak_bytes))
        return tuple(sorted(found, key=lambda held: -held.size_bytes))


def hbm_use(machine: Machine, work: Workload, layout: Layout, passes: Passes) -> HbmUse:
    """Return HBM over the step of one device of `machine`, as an implementation with `passes` uses
    it.

    Of a layout of many plans (of one kind, `sizes.kind_of`) all figures are arrays.
    """
    capacity_bytes = machine.chip.hbm_usable_bytes / machine.chip.devices_per_chip
    account = _account(machine, work, layout, passes)
    passes = account.passes
    if passes.brings_back and np.any(account.brought_back):
        # It comes back beside the logits, before the head's gradient is made: never is that there
        # with the table (five programs of llama3.1-8b, on v5e, v5p and v6e).
        passes = replace(passes, head_last=passes.head_last or "head")
        account = replace(account, passes=passes)
    at = least = account.at
    activations = account.activations_bytes
    if passes.scarce is not None:
        least = _least(account)
        if passes.recomputes:
            dropped = replace(account, layout=dropping(layout))
            again = _least(dropped)
            least = (np.minimum(least[0], again[0]), np.minimum(least[1], again[1]))
        room = passes.share * capacity_bytes
        at = (_within(at[0], least[0], room), _within(at[1], least[1], room))
        if passes.recomputes:
            state = account.parameters_bytes + account.optimizer_bytes + account.gradients_bytes
            left = np.maximum(np.maximum(*at) - state, dropped.activations_bytes)
            activations = np.minimum(activations, left)
    return HbmUse(
        capacity_bytes=capacity_bytes,
        parameters_bytes=account.parameters_bytes,
        optimizer_bytes=account.optimizer_bytes,
        gradients_bytes=account.gradients_bytes,
        activations_bytes=activations,
        at=at,
        thrifty_bytes=np.maximum(least[0], least[1] + account.beside_head)
        * (1.0 + passes.least.tight),
        host_bytes=account.host_bytes,
        host_capacity_bytes=machine.chip.host_bytes_per_device,
        account=account,
    )


def least_state_bytes(machine: Machine, work: Workload, layout: Layout, passes: Passes) -> Number:
    """Return bytes of weights, optimizer state and gradients on one device: what `hbm_use` finds at
    least, whatever layers keep, at a small part of its price."""
    account = _account(machine, work, layout, passes.least)
    return account.parameters_bytes + account.optimizer_bytes + account.gradients_bytes


def _account(machine: Machine, work: Workload, layout: Layout, passes: Passes) -> Account:
    """Return what HBM holds as an implementation with `passes` uses it."""
    if work.forward_only:  # the least: what else is held, is held for a backward pass
        passes = Passes()
    if passes.lanes_taken and work.gathers_asynchronous:
        passes = replace(passes, lanes=1.0)
    if layout.partitioned:
        passes = passes.partitioned or passes
    measures = tuple(measure_of(machine.chip, part, layout) for part in work.parts)
    return Account(machine, work, layout, passes, measures)


def dropping(layout: Layout, layers: int = 0, of: int = 0) -> Layout:
    """Return a layout whose layers keep the least: nothing, where no policy marks what to keep.

    Of one group of `of` layers the first `layers` do so, if that many are given.
    """
    least = tuple(
        replace(
            group, names=tuple(frozenset() if "rest" in names else names for names in group.names)
        )
        for group in layout.kept
    )
    if len(least) == 1 and 0 < layers < of:
        (every,) = layout.kept
        least = replace(least[0], layers=layers), replace(every, layers=of - layers)
    return layout.reshaped(kept=least)


def _least(account: Account) -> tuple[Number, Number]:
    """Return bytes in use at `MOMENTS` where memory is scarce: of the ways to spend little, the one
    whose peak is lowest."""
    passes = account.passes.least
    found = replace(account, passes=passes).at
    if passes.scarcer is None:
        return found
    other = replace(account, passes=passes.scarcer).at
    better = np.less(np.maximum(*other), np.maximum(*found))
    better = better & np.greater(account.layout.gather.size, 1)
    return np.where(better, other[0], found[0]), np.where(better, other[1], found[1])


def _within(plenty: Number, least: Number, room: float) -> Number:
    """Return what is used: as if memory were plentiful, up to `room`, but what is needed anyway."""
    return np.maximum(least, np.minimum(plenty, room))
