"""From a published run to the plan (or plans) that predict it."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod

import numpy as np

from shardsim.cost.hbm import hbm_use
from shardsim.cost.predict import Prediction, predict
from shardsim.errors import PlanError
from shardsim.machine import Machine, default_slice, load_chip
from shardsim.plan.layout import EMBED_SHARDED, ROLES, Layout, whole_axis
from shardsim.plan.legality import check
from shardsim.plan.placement import place
from shardsim.plan.plan import MeshAxis, Overlap, Plan, Precision
from shardsim.plan.remat import Remat
from shardsim.plan.resolve import AXIS_NAMES, resolve, rules_of
from shardsim.program.passes import HOLDS, USUAL
from shardsim.program.shapes import Workload
from shardsim.validate.remat_words import REMAT_POLICIES
from shardsim.validate.rows import Run

# Sizes of a tensor axis that a source does not state.
UNKNOWN_TENSOR = (1, 2, 4, 8, 16)
# Chips and images per step where a data-parallel run states neither.
UNKNOWN_CHIPS = (256, 512, 1024)
UNKNOWN_BATCH = (4096, 16384, 65536)


def plans_of(run: Run) -> list[Plan]:
    """Return the plan of a run; several where the source leaves a size open."""
    if run.machine is None:
        machines = [default_slice(load_chip(run.family), count) for count in UNKNOWN_CHIPS]
        batches = [run.batch] if run.batch else list(UNKNOWN_BATCH)
        return [_plan(run, machine, batch, {}) for machine in machines for batch in batches]
    if run.batch is None:
        raise PlanError("global_batch: missing, and no per_device_batch either")
    machine = run.machine
    if run.sizes is None:
        plans = [
            _plan(run, machine, run.batch, {"tensor": size})
            for size in UNKNOWN_TENSOR
            if run.model.heads % size == 0 and machine.devices_per_slice % size == 0
        ]
        return plans
    return [_plan(run, machine, run.batch, dict(run.sizes))]


def mesh_of_run(run: Run, machine: Machine, sizes: Mapping[str, int]) -> tuple[MeshAxis, ...]:
    """Return the mesh of a run whose sizes by role are `sizes`: what is left over is filled in.

    Sizes count one slice, or the whole job where they divide only that (as they always do on GPU
    nodes, of which no one counts the parallelism inside).
    """
    sizes = dict(sizes)
    outside = {role: size for role, size in run.slice_sizes.items() if size > 1}
    devices, product = machine.devices_per_slice, prod(sizes.values())
    whole_job = machine.chip.interconnect == "switch" or devices % product != 0
    if whole_job and not outside and machine.slices > 1 and machine.devices % product == 0:
        rest = _rest_role(run, machine, machine.devices // product)
        sizes[rest] = sizes.get(rest, 1) * (machine.devices // product)
        left = machine.slices
        for role in ROLES:
            if (part := gcd(left, sizes.get(role, 1))) > 1:
                outside[role] = part
                sizes[role] //= part
                left //= part
    elif devices % product:
        raise PlanError(
            f"parallelism: sizes multiply to {product}, which does not divide the {devices} "
            f"devices of a slice of {machine.name}"
        )
    else:
        rest = _rest_role(run, machine, devices // product)
        sizes[rest] = sizes.get(rest, 1) * (devices // product)
        if machine.slices % prod(outside.values()):
            raise PlanError(
                f"parallelism: sizes over slices multiply to {prod(outside.values())}, but there "
                f"are {machine.slices} slices"
            )
        left = machine.slices // prod(outside.values())
        outside["data"] = outside.get("data", 1) * left
    roles = [role for role in ROLES if sizes.get(role, 1) * outside.get(role, 1) > 1]
    one = Machine(chip=machine.chip, shape=machine.shape, twisted=machine.twisted)
    axes = place({AXIS_NAMES[role]: sizes.get(role, 1) for role in roles}, one)
    return tuple(
        MeshAxis(
            name=axis.name,
            size=axis.size * outside.get(role, 1),
            torus=({"dcn": outside[role]} if outside.get(role, 1) > 1 else {}) | dict(axis.torus),
        )
        for role, axis in zip(roles, axes, strict=True)
    )


def _rest_role(run: Run, machine: Machine, left: int) -> str:
    """Return the role of `left` devices that the row's sizes leave over."""
    if run.rest is not None:
        return run.rest
    return "fsdp" if left == machine.chip.devices_per_chip else "data"


def _plan(run: Run, machine: Machine, batch: int, sizes: Mapping[str, int]) -> Plan:
    mesh = mesh_of_run(run, machine, sizes)
    plan = _with_remat(run, machine, batch, mesh, run.remat or REMAT_POLICIES["none"])
    if run.remat is not None:
        return plan
    for name in ("none", "dots", "full"):
        plan = _with_remat(run, machine, batch, mesh, REMAT_POLICIES[name])
        holds = HOLDS[USUAL[plan.op_costs]]
        if bool(np.all(hbm_use(machine, Workload.of(plan), resolve(plan), holds).fits)):
            break
    return plan


def _with_remat(
    run: Run, machine: Machine, batch: int, mesh: tuple[MeshAxis, ...], remat: Remat
) -> Plan:
    unused = whole_axis(len(machine.axes))
    skeleton = Layout(
        data=unused,
        fsdp=unused,
        context=unused,
        tensor=unused,
        tensor2=unused,
        pipeline=unused,
        residual=EMBED_SHARDED,
        optimizer_over_data=run.replicated,
        context_shards_parameters=run.rest != "data",
    )
    parameters, activations, optimizer = rules_of(skeleton, mesh)
    return Plan(
        name=run.id,
        model=run.model,
        machine=machine,
        batch=batch,
        sequence=run.sequence,
        mesh=mesh or (MeshAxis(name="data", size=1, torus={}),),
        parameters=parameters,
        activations=activations,
        optimizer_rules=optimizer,
        remat=remat,
        microbatches=_microbatches(run, batch, {axis.name: axis.size for axis in mesh}),
        overlap=Overlap(**run.overlap),
        precision=Precision(compute=run.compute),
        optimizer=run.optimizer,
        attention=run.attention,
        fused_projections=run.fused,
        pipeline_interleave=run.interleave,
        op_costs=run.op_costs,
    )


def _microbatches(run: Run, batch: int, sizes: Mapping[str, int]) -> int:
    """Return the microbatches per step: as stated, or four per pipeline stage."""
    if run.microbatches is not None:
        return run.microbatches
    if run.microbatch is not None:
        groups = sizes.get(AXIS_NAMES["data"], 1) * sizes.get(AXIS_NAMES["fsdp"], 1)
        return max(1, round(batch / (groups * run.microbatch)))
    stages = sizes.get(AXIS_NAMES["pipeline"], 1)
    return 4 * stages if stages > 1 else 1


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
