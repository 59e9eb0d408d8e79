"""What the operations of a trace are: from the program's HLO, or from names where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.errors import FileError
from shardsim.ops.registry import RUNS
from shardsim.xla.hlo.collect import custom_target, read_collective
from shardsim.xla.hlo.costs import Costs
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.kernels import UNKNOWN
from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import KINDS, TRANSFERS
from shardsim.xla.hlo.scopes import phase_of
from shardsim.xla.hlo.sources import named, source_of
from shardsim.xla.hlo.text import parse_module
from shardsim.xla.profile.files import hlo_text
from shardsim.xla.profile.names import collective_of, guess, is_container, is_started, kernel_name
from shardsim.xla.profile.trace import Trace

CONTAINER, COLLECTIVE = "loops and calls", "collective"

# What a loop over layers does to its arrays besides running a layer, and the function that has it
# (`emit/runtime/model.py`); what a remat policy keeps is rounded where it is named.
KEPT, GRADIENTS, CAST = "kept", "gradients", "cast"
_LOOP = "layers"
_ROUNDED = "reduce_precision"
_WEIGHT_FUNCTIONS = frozenset(("weight", "whole_weight", "gather_weight", "expert_matrix"))
_LOOPS = ("while", "conditional")
_HOLDERS = (*_LOOPS, "call")
_CUBLAS = "__cublas$"
_FMHA = "fmha"


@dataclass(frozen=True, kw_only=True)
class What:
    """What an operation is, as far as its program or its name tells."""

    kind: str  # as of `Work.kind`, or `CONTAINER`, `COLLECTIVE`
    beside: bool = False  # whether it was started to run beside others
    collective: str = ""  # as of `Move.kind`
    mesh_axes: tuple[str, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    run: str = ""  # the op of the emitted program whose function made it
    stack: str = ""  # of what a loop over layers does: `KEPT`, `GRADIENTS` or `CAST`
    scope: str = ""  # JAX's name of it
    source: str = ""  # "norm.py:71 run_norm"


class Program:
    """A program, whose operations are asked for by name."""

    def __init__(self, module: Module | None, mesh: Mapping[str, int]) -> None:
        self.module = module
        self._mesh = mesh
        self._known: dict[tuple[str, str, str], What] = {}
        self._items: dict[str, tuple[Computation, Instruction]] = {}
        if module is None:
            return
        self._costs = Costs(module, UNKNOWN)
        for computation in module.computations.values():
            for name, item in computation.instructions.items():
                self._items[name] = computation, item
        for name, found in list(self._items.items()):
            self._items.setdefault(kernel_name(name), found)

    def what(self, op: str, kernel: str = "", scope: str = "") -> What:
        """Return what an instruction is, or what a kernel of its name is, or looks like.

        Kernels that a CUDA graph runs name the call of the graph, not their own instruction.
        """
        key = op, kernel, scope
        if key not in self._known:
            place = self._items.get(op)
            if place is None or (kernel and place[1].opcode in _HOLDERS):
                place = self._items.get(kernel)
            known = self._read(*place) if place else None
            self._known[key] = known or by_name(op, kernel, scope)
        return self._known[key]

    def _read(self, computation: Computation, item: Instruction) -> What | None:
        """Return what an instruction is; None where nothing in the program says it."""
        assert self.module is not None
        if item.opcode in _LOOPS:
            return What(kind=CONTAINER)
        if item.opcode.endswith(("-done", "-update")) and item.operands:
            return self._read(computation, computation.operand(item, 0))
        try:
            told = named(self.module, item)
            if inner := self._collective(item):
                return self._move(item, inner)
            matmuls = self._matmuls(computation, item)
            moves = item.opcode in TRANSFERS or self._costs.moves_only(item)
            target = custom_target(self.module, item)
            source = source_of(self.module, told)
        except (HloError, ValueError, KeyError, IndexError, TypeError):
            return None  # what the reader of TPU programs does not know
        scope = item.op_name or told.op_name
        run = self._run(told)
        if _FMHA in target or (matmuls and matmuls[0].batch > 1 and not run):
            kind = "attention"
        elif matmuls:
            kind = "matmul"
        elif moves:
            kind = "copy"
        else:
            kind = "optimizer" if phase_of(scope, "") == "update" else "elementwise"
        if item.opcode == "call" and not matmuls:
            kind = CONTAINER
        return What(
            kind=kind,
            beside=item.opcode.endswith("-start"),
            matmuls=matmuls,
            run=run,
            stack=self._stack(told, scope, run),
            scope=scope,
            source=source,
        )

    def _functions(self, item: Instruction) -> list[str]:
        """Return the functions that an instruction comes from, innermost first."""
        assert self.module is not None
        return [frame.function for frame in self.module.frames.stack(item.stack_frame_id)]

    def _run(self, told: Instruction) -> str:
        """Return the op that a function of the emitted program runs, the innermost that is one."""
        known = {run.__name__: name for name, run in RUNS.items()}
        names = (known.get(name.partition(".")[0], "") for name in self._functions(told))
        return next(filter(None, names), "")

    def _stack(self, told: Instruction, scope: str, run: str) -> str:
        """Return what of the loop over layers an instruction is that no op made."""
        last, functions = scope.rpartition("/")[2], self._functions(told)
        if last == "convert_element_type":
            if _WEIGHT_FUNCTIONS.intersection(name.rpartition(".")[2] for name in functions):
                return CAST
        if run or _LOOP not in {name.partition(".")[0] for name in functions}:
            return ""
        phase = phase_of(scope, "forward")
        if phase == "forward" or last in (_ROUNDED, "dynamic_slice", "squeeze"):
            return KEPT
        return GRADIENTS

    def _collective(self, item: Instruction) -> Instruction | None:
        """Return the collective that an instruction is, or holds."""
        assert self.module is not None
        if item.opcode.removesuffix("-start") in KINDS:
            return item
        if item.opcode not in ("fusion", "async-start", "call-start"):
            return None
        inside = self.module.called(item).instructions.values()
        return next((one for one in inside if one.opcode in KINDS), None)

    def _move(self, item: Instruction, inner: Instruction) -> What:
        assert self.module is not None
        told = named(self.module, item)
        kind = KINDS[inner.opcode.removesuffix("-start")]
        axes: tuple[str, ...] = ()
        try:
            found = read_collective(
                self.module, item, self._mesh, block="", count=1, asynchronous=False
            )
        except HloError:
            found = None
        if found is not None:
            kind, axes = found.kind, found.mesh_axes
        return What(
            kind=COLLECTIVE,
            collective=kind,
            mesh_axes=axes,
            scope=told.op_name,
            source=source_of(self.module, told),
        )

    def _matmuls(self, computation: Computation, item: Instruction) -> tuple[Matmul, ...]:
        assert self.module is not None
        if item.opcode == "custom-call" and custom_target(self.module, item).startswith(_CUBLAS):
            shapes = [computation[name].shape for name in item.operands[:2]]
            return (_cublas(item, shapes[0].dims, shapes[1].dims),)
        return self._costs.matmuls(computation, item)


def _cublas(item: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> Matmul:
    """Return the product of a call of cuBLAS, whose configuration says which dimensions meet."""
    dims = item.config("gemm_backend_config", "dot_dimension_numbers")
    if dims is None:
        dims = item.config("dot_dimension_numbers")
    if not isinstance(dims, dict):
        raise HloError(f"%{item.name}: a call of cuBLAS without dimensions", item.line)

    def sizes(shape: tuple[int, ...], side: str, what: str) -> Any:
        return [shape[int(number)] for number in dims.get(f"{side}_{what}_dimensions", ())]

    batch = math.prod(sizes(left, "lhs", "batch"))
    k = math.prod(sizes(left, "lhs", "contracting"))
    return Matmul(
        m=math.prod(left) / (batch * k), k=k, n=math.prod(right) / (batch * k), batch=batch
    )


def by_name(op: str, kernel: str = "", scope: str = "") -> What:
    """Return what an operation looks like by its names."""
    if not kernel and is_container(op):
        return What(kind=CONTAINER, scope=scope)
    if kind := collective_of(op) or collective_of(kernel):
        return What(kind=COLLECTIVE, collective=kind, scope=scope)
    return What(kind=guess(op, kernel, scope), beside=is_started(op), scope=scope)


def program_of(
    trace: Trace, name: str, mesh: Mapping[str, int], text: str | None = None
) -> tuple[Program, tuple[str, ...]]:
    """Return the program called `name` in a trace, and what to know about how it was read.

    `text` is its HLO where the trace has none of its own. Raises `FileError` for a `text` that is
    damaged, and for a program of other than the mesh's devices.
    """
    warnings: list[str] = []
    mine = text
    if mine is None:
        mine = _own_text(trace, name)
    if mine is None:
        warnings.append(
            f"the HLO of {name or 'the step'} is not in the trace: operations are told apart by "
            "name alone (--hlo FILE gives it)"
        )
        return Program(None, mesh), tuple(warnings)
    try:
        parsed = parse_module(mine)
    except HloError as error:
        if text is not None:
            raise FileError(f"--hlo: {error}") from None
        warnings.append(f"the HLO in the trace is not understood ({error}): only names are used")
        return Program(None, mesh), tuple(warnings)
    devices = math.prod(mesh.values())
    if parsed.partitions not in (None, devices):
        raise FileError(
            f"{trace.path}: {name or 'its program'} runs on {parsed.partitions} devices, but the "
            f"plan's mesh has {devices}"
        )
    return Program(parsed, mesh), tuple(warnings)


def _own_text(trace: Trace, name: str) -> str | None:
    """Return the HLO that a trace holds of a program: by number, or of the only one so called."""
    known = trace.file.programs()
    plain = name.partition("(")[0]
    alike = [module for other, module in known.items() if other.partition("(")[0] == plain]
    module = known.get(name) or (alike[0] if len(alike) == 1 else None)
    return hlo_text(module) if module else None
