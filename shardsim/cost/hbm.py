"""HBM over the step: when it peaks, and whether the plan fits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.machine import Machine
from shardsim.plan.layout import Number
from shardsim.program.tasks import Memory

MOMENTS = ("first layer of the backward pass", "output head")


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
    workspace_bytes: Number  # at the peak: gathered weights and live intermediates
    at: tuple[Number, ...]

    @property
    def peak_bytes(self) -> Number:
        """The largest use over the step."""
        peak = self.at[0]
        for other in self.at[1:]:
            peak = np.maximum(peak, other)
        return peak

    @property
    def fits(self) -> Number:
        """Whether the peak is within what the compiler offers."""
        return np.less_equal(self.peak_bytes, self.capacity_bytes)

    @property
    def peak_moment(self) -> str:
        """When a single plan's HBM peaks."""
        return MOMENTS[int(np.argmax([float(use) for use in self.at]))]


def hbm_use(machine: Machine, memory: Memory) -> HbmUse:
    """Return HBM over the step of one device of `machine`."""
    chip = machine.chip
    state = memory.parameters + memory.optimizer
    layer = memory.gathered_weights + memory.layer_workspace
    backward = state + memory.saved_activations + memory.gradients + layer
    head = state + memory.saved_activations + memory.head_workspace
    workspace = np.where(
        np.greater_equal(backward, head),
        layer,
        np.maximum(memory.head_workspace - memory.gradients, 0.0),
    )
    return HbmUse(
        capacity_bytes=chip.hbm_usable_bytes / chip.devices_per_chip,
        parameters_bytes=memory.parameters,
        optimizer_bytes=memory.optimizer,
        gradients_bytes=memory.gradients,
        activations_bytes=memory.saved_activations,
        workspace_bytes=workspace,
        at=(backward, head),
    )
