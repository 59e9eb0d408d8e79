"""Constants of a module, followed from where they are used to where they are written."""

from __future__ import annotations

from shardsim.xla.hlo.module import Computation, Instruction, Module

_SAME = frozenset(("copy", "bitcast", "reshape", "copy-start", "copy-done"))


class Constants:
    """Finds the constant that a value is, through copies, tuples and loops that hand it on."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._loops: dict[str, list[tuple[Computation, Instruction]]] = {}
        for computation in module.computations.values():
            for item in computation.instructions.values():
                if item.opcode == "while":
                    self._loops.setdefault(self._body(item).name, []).append((computation, item))

    def behind(self, computation: Computation, item: Instruction) -> Instruction | None:
        """Return the constant that `item` always is, or None where it is not known to be one."""
        origin = self._origin(computation, item)
        if origin.opcode == "constant":
            return origin
        index = _carried(computation, origin)
        loops = self._loops.get(computation.name, [])
        if index is None or len(loops) != 1 or not self._keeps(computation, index):
            return None
        outer, loop = loops[0]
        first = _first(outer, loop, index)
        return None if first is None else self.behind(outer, first)

    def _origin(self, computation: Computation, item: Instruction) -> Instruction:
        """Return where a value comes from, as far as this computation tells."""
        while True:
            source: Instruction | None = None
            if item.opcode in _SAME:
                source = computation.operand(item, 0)
            elif item.opcode == "get-tuple-element":
                holder, index = computation.operand(item, 0), int(item.attribute("index"))
                if holder.opcode == "tuple":
                    source = computation.operand(holder, index)
                elif holder.opcode == "while" and self._keeps(self._body(holder), index):
                    source = _first(computation, holder, index)
            if source is None:
                return item
            item = source

    def _keeps(self, body: Computation, index: int) -> bool:
        """Return whether a loop's body hands on element `index` of its state as it is."""
        root = body[body.root]
        if root.opcode != "tuple":
            return False
        return _carried(body, self._origin(body, body.operand(root, index))) == index

    def _body(self, loop: Instruction) -> Computation:
        return self.module.computations[loop.attribute("body").removeprefix("%")]


def _carried(computation: Computation, item: Instruction) -> int | None:
    """Return which element of the computation's only parameter `item` is, or None."""
    if item.opcode != "get-tuple-element":
        return None
    whole = computation.operand(item, 0).opcode == "parameter" and len(computation.parameters) == 1
    return int(item.attribute("index")) if whole else None


def _first(computation: Computation, loop: Instruction, index: int) -> Instruction | None:
    """Return what an element of a loop's state is when the loop starts."""
    state = computation.operand(loop, 0)
    return computation.operand(state, index) if state.opcode == "tuple" else None
