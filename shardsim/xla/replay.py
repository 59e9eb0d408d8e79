"""A compiled program replayed on a machine: what the step takes as the compiler scheduled it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardsim.cost.predict import TIME_PARTS, CollectiveUse, collective_uses
from shardsim.cost.price import CollectiveCost, ComputeCost
from shardsim.cost.replay import BlockTime, Replayed, replay_schedule
from shardsim.errors import PlanError
from shardsim.machine import Machine
from shardsim.model import model_flops_per_token
from shardsim.plan.layout import Layout
from shardsim.plan.plan import Plan
from shardsim.program.schedule import Move
from shardsim.xla.hlo import CompiledProgram


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A compiled step on a machine. The parts of `time` add up to `step_time_s`."""

    step_time_s: float
    time: dict[str, float]  # keys: predict.TIME_PARTS
    mfu: float | None  # None where only a layout was given, not the plan
    hfu: float
    collectives: tuple[CollectiveUse, ...]
    blocks: tuple[BlockTime, ...]
    computes: tuple[ComputeCost, ...] = field(repr=False)
    collective_costs: tuple[CollectiveCost, ...] = field(repr=False)  # one for each instruction
    warnings: tuple[str, ...] = ()


def replay(machine: Machine, where: Plan | Layout, compiled: CompiledProgram) -> Replay:
    """Replay `compiled`, a program for the mesh of a plan (or of its layout), on `machine`.

    Compute takes the compiler's own estimate of cycles at the chip's clock; collectives take what
    the closed forms say for the links of their groups.
    """
    if isinstance(where, Plan):
        mesh = {axis.name: axis.size for axis in where.mesh}
        if mesh != compiled.mesh:
            raise PlanError(f"replay: the plan's mesh is {mesh}, the program's {compiled.mesh}")
    return replay_of(machine, where, compiled, replay_schedule(machine, where, compiled.schedule))


def replay_of(
    machine: Machine, where: Plan | Layout, compiled: CompiledProgram, replayed: Replayed
) -> Replay:
    """Return what `replayed`, closed forms or events, says of a step of `compiled`."""
    price = replayed.price
    step_time_s = float(price.step_time_s)
    chip = machine.chip
    dtype = where.precision.compute if isinstance(where, Plan) else "bf16"
    peak = chip.peak(dtype)
    mfu = None
    if isinstance(where, Plan):
        flops = model_flops_per_token(where.model, where.sequence) * where.tokens
        mfu = flops / machine.chips / step_time_s / peak
    return Replay(
        step_time_s=step_time_s,
        time={name: float(getattr(price, name)) for name in TIME_PARTS},
        mfu=mfu,
        hfu=float(price.flops) * chip.devices_per_chip / step_time_s / peak,
        collectives=_summed(price.collectives),
        blocks=replayed.blocks,
        computes=tuple(price.computes),
        collective_costs=tuple(price.collectives),
        warnings=(*compiled.schedule.warnings, *_clock_warning(machine)),
    )


def _summed(costs: list[CollectiveCost]) -> tuple[CollectiveUse, ...]:
    """Return the collectives, summed as in a prediction."""
    sums: dict[tuple[str, tuple[str, ...], str], np.ndarray[Any, Any]] = {}
    for cost in costs:
        key: tuple[str, tuple[str, ...], str] = ("host-transfer", (), cost.task.moves)
        if isinstance(cost.task, Move):
            key = (cost.task.kind, cost.task.mesh_axes, cost.task.moves)
        row = np.array([cost.sent_bytes, cost.count, cost.time_s, cost.exposed_s], dtype=float)
        sums[key] = sums.get(key, np.zeros(4)) + row
    return collective_uses(sums)


def _clock_warning(machine: Machine) -> tuple[str, ...]:
    """Say where the clock that turns cycles into seconds is not a published figure."""
    figure = machine.chip.figures.get("clock_hz", {})
    status = figure.get("status", "not known")
    if status == "published":
        return ()
    return (f"the clock of {machine.chip.name}, {machine.chip.clock_hz:g} Hz, is {status}",)
