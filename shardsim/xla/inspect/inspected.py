"""A compiled program of anyone's, read and priced: the step, its operations, what it sends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from shardsim.cost.costs import costs_of
from shardsim.cost.meshlinks import DCN, MeshLinks
from shardsim.cost.task_times import TaskTimes
from shardsim.errors import FileError, HardwareError, PlanError
from shardsim.machine import Chip, Machine, chip_names, default_slice, load_chip, parse_machine
from shardsim.plan.plan import MeshAxis
from shardsim.program.schedule import Copy, Move
from shardsim.xla.hlo.check import check_module
from shardsim.xla.hlo.collect import CompiledCollective, custom_target
from shardsim.xla.hlo.compiled import CompiledProgram, read_module
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.kernels import Masks
from shardsim.xla.hlo.module import Module
from shardsim.xla.inspect.mesh import devices_of, layout_of, mesh_of, placed, read_mesh
from shardsim.xla.inspect.reasons import Reason, Reasons
from shardsim.xla.inspect.texts import read_program, read_text
from shardsim.xla.inspect.walk import Walk
from shardsim.xla.replay import Replay, replay

_SOURCE = re.compile(r"(?P<file>[^:]+):(?P<line>\d+)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A collective, a copy or a host transfer of one place of the source, over a step of a device.

    Seconds are None where the program has no schedule of a TPU, or no slice is known.
    """

    kind: str  # "all-gather", ..., "copy" for laying an array out anew, "host-transfer"
    mesh_axes: tuple[str, ...]
    torus_axes: tuple[str, ...]
    array: str  # "bf16[8,1024]", the largest
    bytes: float  # sent by one device, or through its HBM
    count: int
    time_s: float | None  # on its own
    exposed_s: float | None  # of that, what nothing hides
    source: str  # "model.py:67 Block.attend"
    op_name: str
    reason: Reason

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        place = _SOURCE.match(self.source)
        data = {**vars(self), "mesh_axes": [*self.mesh_axes], "torus_axes": [*self.torus_axes]}
        del data["reason"]
        return data | {
            "source_file": place["file"] if place else None,
            "source_line": int(place["line"]) if place else None,
            "unexpected": self.reason.why or None,
            "constraint": self.reason.constraint or None,
            "argument": self.reason.argument or None,
        }


@dataclass(frozen=True, kw_only=True)
class OfKind:
    """All operations of one kind in a step of one device."""

    kind: str
    count: int
    time_s: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What a compiled program does in a step, as far as its text tells."""

    name: str
    machine: Machine | None
    devices: int
    mesh: tuple[MeshAxis, ...]  # `torus` is empty where no slice is known
    mesh_named: bool  # whether its names are the program's or a person's
    step_time_s: float | None
    time: Mapping[str, float] | None
    hfu: float | None
    arguments_bytes: float
    peak_bytes: float | None
    operations: tuple[OfKind, ...]
    rows: tuple[Row, ...]  # costliest first
    not_said: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def unexpected(self) -> tuple[Row, ...]:
        """The rows that nothing asked for, costliest first."""
        return tuple(row for row in self.rows if row.reason.why)

    def to_data(self) -> dict[str, Any]:
        """Return the JSON of `shardsim inspect`."""
        machine = self.machine
        return {
            "program": self.name,
            "machine": machine.name if machine else None,
            "devices": self.devices,
            "mesh": [
                {"name": axis.name, "size": axis.size, "torus": dict(axis.torus)}
                for axis in self.mesh
            ],
            "mesh_named": self.mesh_named,
            "step_time_s": self.step_time_s,
            "time": self.time and dict(self.time),
            "hfu": self.hfu,
            "hbm": {
                "capacity_bytes": _capacity(machine),
                "arguments_bytes": self.arguments_bytes,
                "peak_bytes": self.peak_bytes,
            },
            "operations": [vars(one) for one in self.operations],
            "collectives": [row.to_data() for row in self.rows],
            "not_said": list(self.not_said),
            "warnings": list(self.warnings),
        }


def inspect_file(
    path: str, on: str | None = None, mesh: str | None = None, causal: bool | None = None
) -> Inspected:
    """Inspect a file with a program's HLO: a dump, or what `compiled.as_text()` gave.

    `on` is the slice, or the chip; `mesh` its axes as `data=4,fsdp=16`; `causal` as `inspect_hlo`.
    """
    given = read_mesh(mesh) if mesh else None
    chip = on if on in chip_names() else None
    machine = parse_machine(on) if on and chip is None else None
    text, peak_bytes = read_program(path)
    try:
        module = read_text(text)
        if chip is not None:
            machine = slice_of(load_chip(chip), devices_of(module))
        return inspect_module(module, machine, given, peak_bytes=peak_bytes, causal=causal)
    except HloError as error:
        raise FileError(f"{path}: {error}") from None


def slice_of(chip: Chip, devices: int) -> Machine:
    """Return the vendor's slice of a chip that has so many devices."""
    if devices % chip.devices_per_chip:
        raise HardwareError(f"--on {chip.name}: {devices} devices are no whole chips")
    return default_slice(chip, devices // chip.devices_per_chip)


def inspect_hlo(
    text: str,
    machine: Machine | None = None,
    mesh: Mapping[str, int] | None = None,
    *,
    axes: tuple[MeshAxis, ...] = (),
    peak_bytes: float | None = None,
    causal: bool | None = None,
) -> Inspected:
    """Inspect HLO `text` of a program for `machine`; without one nothing has a price.

    `mesh` names the axes on which its devices are numbered, major first; left out, it is what the
    text says, or the coarsest on which every group is a grid. It lies on the torus as JAX's
    `create_device_mesh` lays it, unless `axes` say how. `causal` says whether attention kernels
    whose mask the text leaves out are causal; unsaid, all their blocks count, with a warning.
    Raises `HloError` for text that is damaged, `PlanError` for another slice than the program's.
    """
    return inspect_module(
        read_text(text), machine, mesh, axes=axes, peak_bytes=peak_bytes, causal=causal
    )


def inspect_module(
    module: Module,
    machine: Machine | None = None,
    mesh: Mapping[str, int] | None = None,
    *,
    axes: tuple[MeshAxis, ...] = (),
    peak_bytes: float | None = None,
    causal: bool | None = None,
) -> Inspected:
    """Inspect a parsed program, as `inspect_hlo` does."""
    try:
        named = bool(mesh) or bool(axes)
        slices = machine.slices if machine is not None and _is_of_slices(module, machine) else 1
        if axes:
            mesh = {axis.name: axis.size for axis in axes}
        if mesh is None:
            mesh, named = mesh_of(module)
            mesh = {"slices": slices, **mesh} if slices > 1 else mesh
        if _product(mesh.values()) != devices_of(module) * slices:
            raise PlanError(
                f"mesh: its axes multiply to {_product(mesh.values())}, but the program is for "
                f"{devices_of(module) * slices} devices"
            )
        if machine is not None:
            axes = axes or placed(dict(mesh), machine)
        else:
            axes = tuple(MeshAxis(name=n, size=size, torus={}) for n, size in mesh.items())
        found = _Reader(module, machine, axes, causal).read()
    except RecursionError:
        raise HloError("computations that call each other too deeply") from None
    said = found.not_said
    if peak_bytes is None:
        said = (*said, "the HBM peak: it stands in the buffer assignment beside a dump")
    return replace(found, mesh_named=named, peak_bytes=peak_bytes, not_said=said)


class _Reader:
    """Reads one parsed program."""

    def __init__(
        self,
        module: Module,
        machine: Machine | None,
        axes: tuple[MeshAxis, ...],
        causal: bool | None = None,
    ) -> None:
        self.module = module
        self.causal = causal
        self.machine = machine
        self.axes = axes
        over = {axis.name: axis.torus.get("dcn", 1) for axis in axes}
        if machine is None or not _is_of_slices(module, machine):
            over = dict.fromkeys(over, 1)
        self.mesh = {axis.name: axis.size // over[axis.name] for axis in axes}
        self.slices = [(name, n, self.mesh[name]) for name, n in over.items() if n > 1]
        self.links = None
        if machine is not None:
            self.layout = layout_of(machine, axes)
            self.links = MeshLinks(machine, self.layout)
        in_slice = machine.devices // machine.slices if machine else None
        self.reasons = Reasons(module, _capacity(machine), in_slice)
        self.warnings: dict[str, None] = {}
        self.not_said: list[str] = []

    def read(self) -> Inspected:
        entry = self.module.computations[self.module.entry]
        compiled, replayed = self._scheduled()
        rows = self._unscheduled() if compiled is None else self._rows(compiled, replayed)
        return Inspected(
            name=self.module.name,
            machine=self.machine,
            devices=max(1, _product(axis.size for axis in self.axes)),
            mesh=self.axes,
            mesh_named=False,
            step_time_s=replayed.step_time_s if replayed else None,
            time=replayed.time if replayed else None,
            hfu=replayed.hfu if replayed else None,
            arguments_bytes=sum(entry[name].shape.hbm_bytes for name in entry.parameters),
            peak_bytes=None,
            operations=_by_kind(replayed) if replayed else (),
            rows=_summed(rows),
            not_said=tuple(self.not_said),
            warnings=tuple(self.warnings),
        )

    def _scheduled(self) -> tuple[CompiledProgram | None, Replay | None]:
        """Return the schedule of a TPU program, and its replay where the slice is known."""
        tiled = any(shape.tiles for item in self.module.homes for shape in item.shape.arrays)
        if not self.module.is_scheduled or not tiled:
            what = "for no TPU" if self.module.is_scheduled else "not scheduled yet"
            self.not_said.append(
                f"step time, operations and what is exposed: the program is {what}; its collectives"
                " and copies are listed with what they take alone"
            )
            return None, None
        compiled = read_module(
            self.module, self.mesh, Masks(causal=self.causal), slices=self.slices
        )
        self.warnings.update(dict.fromkeys(compiled.schedule.warnings))
        if self.machine is None:
            self.not_said.append("any time: name the slice or the chip with --on")
            return compiled, None
        replayed = replay(self.machine, self.layout, compiled)
        self.warnings.update(dict.fromkeys(replayed.warnings))
        return compiled, replayed

    def _rows(self, compiled: CompiledProgram, replayed: Replay | None) -> Iterable[Row]:
        known = replayed.collective_costs if replayed else ()
        costs = {cost.task.name: cost for cost in known}
        times = {cost.task.name: 0.0 for cost in replayed.computes} if replayed else {}
        for cost in replayed.computes if replayed else ():
            times[cost.task.name] += float(cost.time_s)
        for found in compiled.collectives:
            priced = costs.get(found.name)
            yield self._collective(
                found,
                float(priced.time_s) if priced else None,
                float(priced.exposed_s) if priced else None,
            )
        for copy in compiled.copies:
            time_s = times.get(copy.name)
            yield self._copy(
                copy.name, copy.source, copy.hbm_bytes * copy.trips, copy.trips, time_s, time_s
            )
        for moved in known:
            if isinstance(moved.task, Copy):
                yield Row(
                    kind="host-transfer",
                    mesh_axes=(),
                    torus_axes=(),
                    array="",
                    bytes=float(moved.sent_bytes),
                    count=round(float(moved.count)),
                    time_s=float(moved.time_s),
                    exposed_s=float(moved.exposed_s),
                    source=moved.task.source,
                    op_name="",
                    reason=Reason(),
                )

    def _unscheduled(self) -> Iterable[Row]:
        check_module(self.module, self.mesh)
        walk = Walk(self.module, self.mesh)
        self.warnings.update(walk.warnings)
        times = None
        if self.machine is not None and self.links is not None:
            times = TaskTimes(costs_of("physical", self.machine.chip), self.links)
        if any(custom_target(self.module, item) == "Sharding" for item in self.module.homes):
            self.not_said.append("collectives: the partitioner has not run yet; give a later dump")
        for found in walk.collectives:
            alone_s = times.alone_s(found.move()) * found.count if times else None
            yield self._collective(found, alone_s, None)
        for laid in walk.copies:
            through = laid.hbm_bytes * laid.count
            alone_s = through / times.costs.hbm_bytes_per_s if times else None
            yield self._copy(laid.name, laid.source, through, laid.count, alone_s, None)

    def _collective(
        self, found: CompiledCollective, time_s: float | None, exposed_s: float | None
    ) -> Row:
        item = self.reasons.operation(found.name)
        largest = max(item.shape.arrays, key=lambda shape: shape.bytes)
        return Row(
            kind=found.kind,
            mesh_axes=found.mesh_axes,
            torus_axes=self._torus_axes(found.move()),
            array=largest.form,
            bytes=found.sent_bytes * found.count,
            count=found.count,
            time_s=time_s,
            exposed_s=exposed_s,
            source=found.source,
            op_name=found.op_name,
            reason=self.reasons.collective(found),
        )

    def _copy(
        self,
        name: str,
        source: str,
        through_bytes: float,
        count: int,
        time_s: float | None,
        exposed_s: float | None,
    ) -> Row:
        item = self.reasons.operation(name)
        return Row(
            kind="copy",
            mesh_axes=(),
            torus_axes=(),
            array=item.shape.arrays[0].form,
            bytes=through_bytes,
            count=count,
            time_s=time_s,
            exposed_s=exposed_s,
            source=source,
            op_name=item.op_name,
            reason=self.reasons.copy(item),
        )

    def _torus_axes(self, move: Move) -> tuple[str, ...]:
        if self.links is None or self.machine is None:
            return ()
        torus = self.machine.axes
        order = self.links.route_of(move).order
        return tuple("dcn" if place == DCN else torus[place].name for place in order)


def _is_of_slices(module: Module, machine: Machine) -> bool:
    """Return whether a program of several slices is written as that of one."""
    return devices_of(module) * machine.slices == machine.devices


def _capacity(machine: Machine | None) -> float | None:
    """Return the HBM of one device that a program can use."""
    return machine.chip.hbm_usable_bytes / machine.chip.devices_per_chip if machine else None


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _by_kind(replayed: Replay) -> tuple[OfKind, ...]:
    """Return the operations of a step by kind, the longest first."""
    sums: dict[str, OfKind] = {}
    for cost in replayed.computes:
        kind = cost.task.kind
        one = sums.get(kind, OfKind(kind=kind, count=0, time_s=0.0, flops=0.0))
        sums[kind] = OfKind(
            kind=kind,
            count=one.count + round(float(cost.count)),
            time_s=one.time_s + float(cost.time_s),
            flops=one.flops + float(cost.flops),
        )
    return tuple(sorted(sums.values(), key=lambda one: -one.time_s))


def _summed(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return one row for each kind, axes, place and reason; costliest first."""
    sums: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (
            row.kind,
            row.mesh_axes,
            row.torus_axes,
            row.source,
            row.reason.why,
            row.reason.argument,
        )
        before = sums.get(key)
        if before is None:
            sums[key] = row
            continue
        larger = max(before, row, key=lambda one: one.bytes / max(one.count, 1))
        sums[key] = replace(
            larger,
            bytes=before.bytes + row.bytes,
            count=before.count + row.count,
            time_s=_added(before.time_s, row.time_s),
            exposed_s=_added(before.exposed_s, row.exposed_s),
        )
    return tuple(
        sorted(
            sums.values(),
            key=lambda one: (-(one.exposed_s or 0.0), -(one.time_s or 0.0), -one.bytes, one.source),
        )
    )


def _added(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
