"""From a derived block to the tasks of one device: operations with sizes, collectives with bytes.

Elementwise work that a compiler fuses stands in the end of a matmul; the rest are streams through
HBM. Every weight of a pass is gathered in one go, and so are its gradients scattered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from shardsim.graph.arrays import Array, Op, Split, matmul_dims
from shardsim.graph.derive import Step, Transfer
from shardsim.plan.layout import Number
from shardsim.plan.precision import DTYPE_BYTES
from shardsim.program.op_tasks import SUM_BYTES, OpTasks
from shardsim.program.purposes import (
    over_tensor,
    works_by_head,
)
from shardsim.program.quantise import quantise
from shardsim.program.rounds import PASSED, ROUND
from shardsim.program.sizes import role_of
from shardsim.program.tasks import (
    GRADIENTS,
    Collective,
    Compute,
    Task,
    fused,
)
from shardsim.program.weights import Weights
from shardsim.records import replace

VECTOR_GRADIENT_BYTES = 4.0  # vectors are summed in float32

VERBS = {
    "all-gather": "gather",
    "reduce-scatter": "scatter",
    "all-reduce": "sum",
    "all-to-all": "turn",
    "permute": "pass on",
}


class Lowering(OpTasks):
    """Writes the passes of one derived block."""

    def forward(self) -> list[Task]:
        """Return the forward pass."""
        return _Pass(self, "forward").forward("", self._once()).done()

    def backward(self, again: Mapping[int, Number]) -> list[Task]:
        """Return the ops that run again, each so many times, and the backward pass."""
        return _Pass(self, "backward").forward(" again", again).backward().done()

    def together(self) -> list[Task]:
        """Return both passes of what runs forward and at once backward: nothing is let go."""
        return _Pass(self, "").forward("", self._once()).backward().done()

    def _once(self) -> dict[int, Number]:
        return dict.fromkeys(range(len(self.derived.steps)), 1)


class _Pass:
    """The tasks of one pass, in order: what is gathered once serves all of its ops."""

    def __init__(self, lowering: Lowering, label: str) -> None:
        self.low = lowering
        self.label = label
        self.tasks: list[Task] = []
        self.made: dict[str, list[int]] = {}  # array, or "d " array -> matmuls that make it
        self.gathered: dict[Transfer, int] = {}
        self.rings: dict[str, int] = {}  # array, or "d " array -> its gather over tensor
        self.weights = Weights(lowering.sizes)
        self.rounds: dict[str, str] = {}  # what comes round backward -> the gradient that reads it
        self.cast: set[str] = set()  # what is in 8 bits already
        self.names: dict[str, frozenset[str]] = {}  # array -> what `Compute.made_of` says of it
        # Matmuls that may be one, by what they share and the dimension in which they lie together.
        self.projections: dict[tuple[str, str], list[int]] = {}

    def done(self) -> list[Task]:
        """Return the tasks; with fused projections, matmuls of one operand or result are one."""
        self.weights.order(self.tasks)
        if not self.low.work.fused_projections:
            return self.tasks
        tasks: list[Task | None] = list(self.tasks)
        names: dict[str, str] = {}
        for (_, dim), group in self.projections.items():
            parts = [task for task in (tasks[at] for at in group) if isinstance(task, Compute)]
            whole = fused(parts, dim, self.low.wire)
            names |= {part.name: whole.name for part in parts}
            for at in group:
                tasks[at] = None
            tasks[group[0]] = whole
        # Matrices of one matmul travel as one array.
        sides = len({key for key in self.projections if not key[0].startswith("d ")})
        made: list[Task] = []
        for task in tasks:
            if isinstance(task, Collective):
                partners = tuple(dict.fromkeys(names.get(name, name) for name in task.partners))
                messages = min(task.messages, sides) if task.purpose == "weights" else task.messages
                task = replace(task, partners=partners, messages=messages)
            elif task is not None and task.end_of:
                task = replace(task, end_of=names.get(task.end_of, task.end_of))
            made += [task] if task is not None else []
        return made

    def forward(self, suffix: str, counts: Mapping[int, Number]) -> _Pass:
        """Write ops in order, each so many times."""
        for number, step in enumerate(self.low.derived.steps):
            if number in counts:
                begun = len(self.tasks)
                self._forward(step, suffix, counts[number], counts)
                if suffix:
                    self._change(begun, again=True)
                else:
                    self._change(begun, made_of=self._name(step.op))
        return self

    def _name(self, op: Op) -> frozenset[str]:
        """Return, and note, what the tasks of an op are made of."""
        of = frozenset({op.out.keep}).union(*(self.names.get(a.name, ()) for a in op.ins))
        self.names[op.out.name] = of | self.names.get(op.out.name, frozenset())
        return of

    def _change(self, begun: int, **fields: Any) -> None:
        """Give fields to the work that was written from task `begun` on."""
        self.tasks[begun:] = [
            replace(task, **fields) if isinstance(task, Compute) else task
            for task in self.tasks[begun:]
        ]

    def backward(self) -> _Pass:
        """Write the gradients of all ops, last first."""
        derived = self.low.derived
        for step in reversed(derived.steps):
            if step.trained:
                self._backward(step)
        for leaf in derived.leaves:
            self._settle(leaf.settles, "d " + leaf.array.name, 1)
        return self

    def _forward(
        self, step: Step, suffix: str, count: Number, counts: Mapping[int, Number]
    ) -> None:
        low, op, place = self.low, step.op, step.place
        name = op.name + suffix
        self._pass_round(step.gathers, name, count)
        self._gather(step.gathers, count)
        if op.product:
            self._quantise(op.ins[0], place, count, low.format(op))
            dims = matmul_dims(op.ins[0].dims, op.ins[1].dims, op.out.dims)
            task = low.matmul(name, op, place, dims, low.width(op.out), op.out, count)
            if not suffix:
                self._project(op, "")
            if op.dtype:  # a router: no ring cuts it
                self.tasks.append(task)
            else:
                self._add_matmul(task, op.out.name, [array.name for array in op.ins])
        elif op.kernel:
            self.tasks.append(low.kernel(name, op, place, gradient=False, count=count))
        stream = op.stream
        if stream.fused:
            self._fuse(op.ins[0].name, low.elements(op.out, place), stream.fused, 0.0)
        apart: Number | None = stream.apart.passes if stream.apart else None
        passes: Number = stream.passes
        if suffix and stream.sums:  # kept, they are only read
            sums = {array.name for array in op.ins if array.keep == "statistics"}
            again = [counts.get(n, 0) for n, s in enumerate(self._steps) if s.op.out.name in sums]
            spared = (1.0 - sum(again)) * bool(sums)
            apart = None if apart is None else apart - (apart - passes) * spared
            passes = passes - stream.sums * spared
        more = (apart, stream.beside, *self._end(stream.joined, *(array.name for array in op.ins)))
        made = low.stream(name, op, place, passes, stream.ops, count, *more)
        read = {array.name for array in op.ins}
        before = [s.op for s in self._steps if s.op.out.name in read]
        self.tasks += self._turning("forward", made, op, before)
        self._settle(step.settles, op.out.name, count)

    def _backward(self, step: Step) -> None:
        low, op, place = self.low, step.op, step.place
        self._settle(step.gradient_settles, "d " + op.out.name, 1)
        self.rounds |= self._pass_round(step.gradient_gathers, f"{op.name} gradient", 1)
        self._gather(step.gradient_gathers, 1)
        if op.product:
            self._quantise(op.out, place, 1, low.format(op), "d ")
            for array, other in zip(op.ins, reversed(op.ins), strict=True):
                if array.trained:
                    self._gradient_matmul(op, place, array, other)
        elif op.kernel:
            name = f"{op.name} gradient"
            self.tasks.append(low.kernel(name, op, place, gradient=True))
        stream = op.stream
        if stream.fused_gradient:
            read = low.elements(op.ins[0], place) * low.wire * stream.fused_reads
            elements = low.elements(op.out, place)
            self._fuse("d " + op.out.name, elements, stream.fused_gradient, read)
        passes, ops = stream.gradient_passes, stream.gradient_ops
        apart = stream.apart.gradient_passes if stream.apart else None
        readers = [s.op for s in self._steps if op.out.name in {array.name for array in s.op.ins}]
        products = sum(bool(reader.product) for reader in readers)
        if apart and products > 1:  # what the gradients of several products add up to
            apart += products
        end = self._end(stream.joined_gradient, "d " + op.out.name)
        more = (apart, stream.beside_gradient, *end)
        made = low.stream(f"{op.name} gradient", op, place, passes, ops, 1, *more)
        made = [replace(task, purpose=GRADIENTS.get(task.purpose, task.purpose)) for task in made]
        self.tasks += self._turning("gradient", made, op, readers)
        if op.product and op.vectors:  # the gradient of a bias is a sum over tokens
            many = float(len(op.vectors))
            name, product = f"{op.name} bias gradient", f"{op.name} dW"
            self.tasks += low.stream(name, op, place, many, many, end_of=product)

    def _end(self, joined: float | None, *read: str) -> tuple[str, float]:
        """Return the last matmul that makes what an op reads last, in whose end the op may run, and
        the arrays that it then moves more; none where none is made or `joined`."""
        numbers = self.made.get(read[-1], []) if read else []
        if joined is None or not numbers:
            return "", 0.0
        return self.tasks[numbers[-1]].name, joined

    @property
    def _steps(self) -> list[Step]:
        return self.low.derived.steps

    def _turning(
        self, what: str, tasks: list[Compute], op: Op, before: Iterable[Op]
    ) -> list[Compute]:
        """Return tasks of an op that say if they are the first to work by head, `before` them."""
        first = works_by_head(op) and not any(map(works_by_head, before))
        return [replace(task, turns=what if first else "") for task in tasks]

    def _gradient_matmul(self, op: Op, place: Split, array: Array, other: Array) -> None:
        """Write the gradient of one operand of a product."""
        low, first = self.low, array is op.ins[0]
        left, right = (op.out, other) if first else (other, op.out)
        dims = matmul_dims(left.dims, right.dims, array.dims)
        if array.weight:
            name, width = f"{op.name} dW", float(low.work.reduce_bytes)
            read = [other.name]
        else:
            name, width = f"{op.name} d {array.name}", low.wire
            read = ["d " + op.out.name]
        task = low.matmul(name, op, place, dims, width, array)
        self._project(op, "dW " if array.weight else "d ")
        if op.dtype:
            self.tasks.append(task)
        else:
            self._add_matmul(task, "d " + array.name, read, whole=bool(array.weight))

    def _project(self, op: Op, prefix: str) -> None:
        """Note what the next matmul of a projection shares with others: its result, where several
        add to it, else its operand."""
        if op.ins[-1].weight != "matrix":
            return
        makers = [step for step in self.low.derived.steps if step.op.out.name == op.out.name]
        shared, dims = (op.out, "knm") if len(makers) > 1 else (op.ins[0], "nkn")
        key = (prefix + shared.name, dims[("", "d ", "dW ").index(prefix)])
        self.projections.setdefault(key, []).append(len(self.tasks))

    def _add_matmul(
        self, task: Compute, makes: str, reads: Iterable[str], whole: bool = False
    ) -> None:
        """Add a matmul; a ring that gathers what it reads cuts it, or it runs `whole` beside."""
        for array in reads:
            ring = self.rings.get(array)
            if ring is not None:
                gather = self.tasks[ring]
                assert isinstance(gather, Collective)
                self.tasks[ring] = replace(
                    gather, schedule="ring", partners=(*gather.partners, task.name)
                )
                task = task if whole else replace(task, ring="gathered")
        self.made.setdefault(makes, []).append(len(self.tasks))
        self.tasks.append(task)

    def _fuse(self, made: str, elements: Number, ops: float, read_bytes: Number) -> None:
        """Add elementwise work to the end of the last matmul that makes an array, if one does."""
        for number in self.made.get(made, [])[-1:]:
            task = self.tasks[number]
            assert isinstance(task, Compute)
            self.tasks[number] = replace(
                task,
                vector_ops=task.vector_ops + elements * ops,
                hbm_bytes=task.hbm_bytes + read_bytes,
                pointwise=task.pointwise + elements,
            )

    def _quantise(
        self, array: Array, place: Split, count: Number, dtype: str, prefix: str = ""
    ) -> None:
        """Cast a matmul's operand to 8 bits, once a pass, where it multiplies in 8."""
        low, name = self.low, prefix + array.name
        if DTYPE_BYTES[dtype] > 1 or name in self.cast:
            return
        self.cast.add(name)
        self.tasks.append(quantise(low.work, name, low.elements(array, place), count))

    # Collectives.

    def _gather(self, transfers: Iterable[Transfer], count: Number) -> None:
        """Bring operands to where an op wants them, unless an op before has done so."""
        low = self.low
        for transfer in transfers:
            if transfer.passed:
                continue
            if transfer.weight in ("matrix", "table"):
                if transfer not in self.gathered:
                    self.gathered[transfer] = -1
                    self._weights(transfer, low.weight_width(transfer), "weights_overlap")
                continue
            if (known := self.gathered.get(transfer)) is not None:
                task = self.tasks[known]
                again = np.maximum(task.count, count * low.sizes.several(transfer.axes))
                self.tasks[known] = replace(task, count=again)
                continue
            self.gathered[transfer] = len(self.tasks)
            name = ("d " if transfer.gradient else "") + transfer.array
            if over_tensor(transfer, "all-gather"):
                self.rings[name] = len(self.tasks)
            width = SUM_BYTES if transfer.wide else low.wire
            self.tasks.append(low.collective(transfer, self._named(transfer, name), width, count))

    def _pass_round(self, moves: Iterable[Transfer], reader: str, count: Number) -> dict[str, str]:
        """Let operands of an op come round; return each with the task that reads it."""
        found: dict[str, str] = {}
        for transfer in (move for move in moves if move.passed):
            name = self._named(transfer, transfer.array)
            width = SUM_BYTES if transfer.wide else self.low.wire
            task = self.low.collective(transfer, name, width, count, schedule=ROUND)
            self.tasks.append(replace(task, partners=(reader,)))
            found[transfer.array] = reader
        return found

    def _named(self, transfer: Transfer, array: str) -> str:
        """Return a name that no other task of the pass has."""
        name = f"{VERBS[transfer.kind]} {array}"
        names = {task.name for task in self.tasks}
        if name in names:
            name = f"{name} over {role_of(transfer.axes)}"
        while name in names:
            name += " again"
        return name

    def _settle(self, transfers: Iterable[Transfer], makes: str, count: Number) -> None:
        """Sum an array to where it is stored, beside the matmuls that make its summands."""
        low = self.low
        for transfer in transfers:
            if transfer.weight:
                width = float(low.work.reduce_bytes)
                if transfer.weight == "vector":
                    width = VECTOR_GRADIENT_BYTES
                self._weights(transfer, width, "gradients_overlap")
                continue
            width = SUM_BYTES if transfer.wide else low.wire
            task = low.collective(transfer, self._named(transfer, makes), width, count)
            partners = self.made.get(makes, []) if over_tensor(transfer, "reduce-scatter") else []
            if partners:
                for number in partners:
                    work = self.tasks[number]
                    assert isinstance(work, Compute)
                    self.tasks[number] = replace(work, ring="scattered")
                names = tuple(self.tasks[number].name for number in partners)
                task = replace(task, schedule="ring", partners=names)
            reader = self.rounds.get(transfer.array)
            if reader and transfer.kind == "reduce-scatter" and transfer.axes <= PASSED:
                task = replace(task, schedule=ROUND, partners=(reader,))
            self.tasks.append(task)

    def _weights(self, transfer: Transfer, width: float, switch: str) -> None:
        """Add a weight to what is gathered or scattered in one go."""
        purpose = transfer.purpose or "weights"
        what = f"gradients of {purpose}" if transfer.gradient else f"{purpose} {self.label}"
        name = f"{VERBS[transfer.kind]} {what}".strip()
        task = self.low.collective(
            transfer, name, width, purpose="weights", schedule="behind", switch=switch
        )
        self.weights.add(self.tasks, transfer, task)
