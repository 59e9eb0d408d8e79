"""From a published run to the plan (or plans) that predict it."""

from __future__ import annotations

from math import prod

import numpy as np

from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.machine import Machine, default_slice, load_chip
from shardsim.plan.layout import EMBED_SHARDED, ROLES, Layout
from shardsim.plan.legality import check
from shardsim.plan.placement import place
from shardsim.plan.plan import MATMUL_OVERLAP, MeshAxis, Overlap, Plan
from shardsim.plan.resolve import AXIS_NAMES, resolve, rules_of
from shardsim.program.partition import partition
from shardsim.program.shapes import Workload
from shardsim.validate.rows import REMAT_POLICIES, Run, check_run

# Sizes of a tensor axis that a source does not state.
UNKNOWN_TENSOR = (1, 2, 4, 8, 16)
# Chips and images per step where a data-parallel run states neither.
UNKNOWN_CHIPS = (256, 512, 1024)
UNKNOWN_BATCH = (4096, 16384, 65536)


def plans_of(run: Run) -> list[Plan]:
    """Return the plan of a run; several where the source leaves a size open."""
    check_run(run)
    if run.machine is None:
        chip = load_chip(run.family)
        machines = [default_slice(chip, count) for count in UNKNOWN_CHIPS]
        batches = [run.batch] if run.batch else list(UNKNOWN_BATCH)
        return [
            _plan(run, machine, batch, _fill(run, machine, {}))
            for machine in machines
            for batch in batches
        ]
    if run.batch is None:
        raise PlanError("global_batch: missing, and no per_device_batch either")
    if run.sizes is None:
        return [
            _plan(run, run.machine, run.batch, _fill(run, run.machine, {"tensor": size}))
            for size in UNKNOWN_TENSOR
            if run.model.heads % size == 0 and run.machine.devices_per_slice % size == 0
        ]
    return [_plan(run, run.machine, run.batch, _fill(run, run.machine, dict(run.sizes)))]


def _fill(run: Run, machine: Machine, sizes: dict[str, int]) -> dict[str, int]:
    """Return sizes of all roles over all slices: what is left goes to fsdp or data."""
    outside = {role: size for role, size in run.slice_sizes.items() if size > 1}
    devices = machine.devices_per_slice
    inside = prod(sizes.values())
    if inside == machine.devices and machine.slices > 1 and not outside:
        # The row counts the whole job; its outermost axis spans the slices.
        for role in ROLES:
            if sizes.get(role, 1) % machine.slices == 0:
                sizes[role] //= machine.slices
                outside[role] = machine.slices
                break
        inside = prod(sizes.values())
    if devices % inside:
        raise PlanError(
            f"parallelism: sizes multiply to {inside}, which does not divide the {devices} "
            "devices of a slice"
        )
    rest = "data" if run.replicated or ("data" in sizes and "fsdp" not in sizes) else "fsdp"
    sizes[rest] = sizes.get(rest, 1) * (devices // inside)
    left = machine.slices // prod(outside.values()) if outside else machine.slices
    outside["data"] = outside.get("data", 1) * max(left, 1)
    if prod(outside.values()) != machine.slices:
        raise PlanError(
            f"parallelism: sizes over slices multiply to {prod(outside.values())}, but there are "
            f"{machine.slices} slices"
        )
    return {
        role: sizes.get(role, 1) * outside.get(role, 1)
        for role in ROLES
        if sizes.get(role, 1) * outside.get(role, 1) > 1
    }


def _plan(run: Run, machine: Machine, batch: int, sizes: dict[str, int]) -> Plan:
    mesh = place({AXIS_NAMES[role]: size for role, size in sizes.items()}, machine)
    plan = _with_remat(run, machine, batch, mesh, run.remat or REMAT_POLICIES["none"])
    if run.remat is not None:
        return plan
    for name in ("none", "dots", "full"):
        plan = _with_remat(run, machine, batch, mesh, REMAT_POLICIES[name])
        layout = resolve(plan)
        program = partition(Workload.of(plan), layout, plan.remat)
        if bool(np.all(hbm_use(machine, program.memory).fits)):
            break
    return plan


def _with_remat(
    run: Run, machine: Machine, batch: int, mesh: tuple[MeshAxis, ...], remat: object
) -> Plan:
    skeleton = Layout(
        **{role: _NOTHING for role in ROLES},  # type: ignore[arg-type]
        residual=EMBED_SHARDED,
        optimizer_over_data=run.replicated,
    )
    parameters, activations, optimizer = rules_of(skeleton, mesh)
    stages = next((axis.size for axis in mesh if axis.name == AXIS_NAMES["pipeline"]), 1)
    return Plan(
        name=run.id,
        model=run.model,
        machine=machine,
        batch=batch,
        sequence=run.sequence,
        mesh=mesh,
        parameters=parameters,
        activations=activations,
        optimizer_rules=optimizer,
        remat=remat,  # type: ignore[arg-type]
        microbatches=4 * stages if stages > 1 else 1,
        overlap=Overlap(**run.overlap),
        optimizer=run.optimizer,
        attention=run.attention,
        fused_projections=run.fused,
    )


_NOTHING = None

assert MATMUL_OVERLAP  # the switch names that `Run.overlap` uses


def predictions_of(run: Run) -> tuple[list[Prediction], list[str]]:
    """Return the predictions of a run, and what about it is only approximate.

    A published run may split sizes that do not divide; the trainer padded them, and so do the
    formulas, which then give slightly too little work.
    """
    predictions = []
    notes = []
    for plan in plans_of(run):
        layout = resolve(plan)
        try:
            check(plan, layout)
        except PlanError as error:
            notes.append(f"uneven: {error}")
        predictions.append(predict(plan, layout))
    return predictions, notes
