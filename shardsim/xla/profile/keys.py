"""What tells the parts of a step apart, planned and measured alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from shardsim.cost.predict import Prediction
from shardsim.graph.arrays import Op
from shardsim.graph.build import Part
from shardsim.model import Model
from shardsim.model.blocks import graph_of
from shardsim.plan import resolve
from shardsim.program.schedule import Copy, Move, Work
from shardsim.xla.profile.products import Products, sizes_of
from shardsim.xla.profile.program import CAST, COLLECTIVE, CONTAINER, GRADIENTS, KEPT, What

Key = tuple[object, ...]  # the kind of work, and what tells it from others of its kind

NOT_LINED_UP = "not lined up"
INSIDE = "planned inside others"
# What the loop over layers does besides running them, by the names of its tasks.
LOOP = "loop over layers"
STACKS: Mapping[str, str] = {
    "keep for backward": KEPT,
    "fill with zeros": KEPT,
    "take what was kept": KEPT,
    "accumulate gradients": GRADIENTS,
    "cast weights": CAST,
}
# Kinds of work that a trace does not tell apart.
_ALIKE: Mapping[str, str] = {"transpose": "copy", "transfer": "copy", "sum": "elementwise"}
_AFTER = "after "  # in the name of what a matmul does in its end, where it is apart
_BY_KIND = ("optimizer", "copy", CONTAINER)
# What else a planned collective over the same axes may have been run as, likeliest first.
_FORMS: Mapping[str, tuple[str, ...]] = {
    "reduce-scatter": ("all-reduce", "permute"),
    "all-gather": ("all-reduce", "permute"),
    "all-reduce": ("reduce-scatter", "all-gather"),
    "permute": ("all-gather", "reduce-scatter"),
}


class Keys:
    """The keys of a prediction's tasks, and of what was `measured`.

    `fine`: the program is known; else names alone, and the parts are kinds of work.
    """

    def __init__(self, prediction: Prediction, measured: Iterable[What], fine: bool) -> None:
        plan = prediction.plan
        self._fine = fine
        self._layout = resolve(plan)
        self._mesh = {axis.name: axis.size for axis in plan.mesh}
        self._owner = owners(plan.model, plan.attention)
        tasks = [cost.task for cost in prediction.price.computes if float(cost.count)]
        self._kinds: dict[str, set[str]] = defaultdict(set)  # of planned work, by op
        for task in tasks:
            self._kinds[self._owner(task.name)].add(_ALIKE.get(task.kind, task.kind))
        # The scores of a fused kernel never leave it: its products are not apart from the rest.
        self._whole = any(task.kind == "attention" and task.fused for task in tasks)
        self._products = Products(sizes_of(task) for task in tasks if task.kind == "matmul")
        for what in measured:
            if what.matmuls and self._kind(what) == "matmul":
                self._products.join(what.matmuls[0])

    def planned(self, task: Work) -> Key:
        """Return the key of planned work."""
        kind = _ALIKE.get(task.kind, task.kind)
        if task.name in STACKS and self._fine:
            return LOOP, STACKS[task.name]
        if not self._fine or kind in _BY_KIND:
            return (kind,)
        if kind == "attention":
            return self._attention(not (isinstance(task.matmuls, int) and task.matmuls == 0))
        if kind == "matmul":
            return kind, self._products.group(sizes_of(task))
        return kind, self._owner(task.name)

    def moved(self, task: Move | Copy) -> Key:
        """Return the key of a planned collective, or of a copy to or from the host."""
        if isinstance(task, Copy):
            return ("copy",)
        if not self._fine:
            return COLLECTIVE, task.kind
        axes = self._layout.mesh_axes(task.role)
        return COLLECTIVE, task.kind, tuple(a for a in self._mesh if a in axes)

    def measured(self, what: What, planned: Mapping[Key, float]) -> Key:
        """Return the key of a measured operation: one of `planned`, or of what has none there.

        What an op of the plan does, though the plan has it inside others, stands on its own.
        """
        key = self._measured(what)
        if key in planned:
            return key
        if what.kind == COLLECTIVE:
            others = ((key[0], kind, *key[2:]) for kind in _FORMS.get(what.collective, ()))
            return next((other for other in others if other in planned), (key[0], NOT_LINED_UP))
        if self._fine and what.run and not what.matmuls:
            return key[0], what.run, INSIDE
        return key[0], NOT_LINED_UP

    def _measured(self, what: What) -> Key:
        kind = self._kind(what)
        if what.stack and not what.matmuls and self._fine:
            return LOOP, what.stack
        if kind == COLLECTIVE:
            return kind, what.collective, *((what.mesh_axes,) if self._fine else ())
        if not self._fine or kind in _BY_KIND:
            return (kind,)
        if kind == "attention":
            return self._attention(bool(what.matmuls))
        if kind == "matmul":
            mine = self._products.alone(what.matmuls[0]) if what.matmuls else None
            return kind, NOT_LINED_UP if mine is None else self._products.group(mine)
        return kind, what.run

    def _kind(self, what: What) -> str:
        """Return what a measured operation is: of an op that attends, what is not planned apart."""
        planned = self._kinds.get(what.run, set())
        apart = "matmul" if what.matmuls else "elementwise"
        if what.kind != apart or "attention" not in planned:
            return what.kind
        if not what.matmuls:
            return apart if apart in planned else "attention"
        first = what.matmuls[0]
        several = first.batch > 1 and self._products.alone(first) is None
        return "attention" if several or apart not in planned else apart

    def _attention(self, products: bool) -> Key:
        return "attention", "whole" if self._whole else ("products" if products else "between")


def owners(model: Model, attention: str) -> Callable[[str], str]:
    """Return what says which op of the emitted program a planned task belongs to.

    Tasks are named after what their op makes or multiplies with, what is done after a matmul after
    that; those that belong to no op keep their name.
    """
    graph = graph_of(model, attention)
    layers = [layer.part for stack in graph.stacks for layer in stack.layers]
    known: dict[str, str] = {}
    ends: dict[str, str] = {}  # by matmul: the op that a compiler may run in its end
    for part in (graph.before, *layers, graph.after):
        makers: dict[str, str] = {}
        for op, run in _runs(part):
            known.setdefault(op.name, run)
            known.setdefault(op.out.name, run)
            makers[op.out.name] = op.name
            if op.stream.fused:
                ends.setdefault(makers[op.ins[0].name], run)
    longest = sorted(known, key=len, reverse=True)

    def owner(task: str) -> str:
        mine = (name for name in longest if task == name or task.startswith(f"{name} "))
        if name := next(mine, ""):
            return known[name]
        matmul = task.partition(_AFTER)[2]
        made = matmul.partition(" d ")[2]
        return known.get(made, "") or ends.get(matmul.partition(" ")[0], task)

    return owner


def _runs(part: Part) -> Iterable[tuple[Op, str]]:
    """Yield ops and the calls that run them: a call ends with the op that makes its last result."""
    calls = list(part.calls)
    for op in part.ops:
        if not calls:
            return
        yield op, calls[0].run
        if op.out.name == calls[0].outs[-1]:
            del calls[0]
