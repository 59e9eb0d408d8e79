"""What one instruction costs: matmuls inside it, bytes through HBM, what kind of work it is."""

from __future__ import annotations

from shardsim.xla.hlo.constants import Constants
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.grouped import grouped_of
from shardsim.xla.hlo.kernels import ELIDED, Executed, Masks
from shardsim.xla.hlo.matmul import Matmul, matmul_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import FREE, KINDS
from shardsim.xla.hlo.shapes import HBM, Shape
from shardsim.xla.hlo.splash import TABLE, kernel_of

# A fusion of nothing else changes how an array lies in memory.
_MOVES = frozenset(("copy", "transpose", "reshape"))
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))


class Costs:
    """Costs of the instructions of a module; what a computation holds is found once."""

    def __init__(self, module: Module, masks: Masks) -> None:
        self.module = module
        self.masks = masks
        self._matmuls: dict[str, tuple[Matmul, ...]] = {}
        self._kernels: dict[Instruction, Executed | None] = {}
        self._constants = Constants(module)

    def kernel(self, computation: Computation, item: Instruction) -> Executed | None:
        """Return what an attention kernel executes; None for all other instructions."""
        if item.opcode != "custom-call":
            return None
        if item not in self._kernels:
            self._kernels[item] = self._executed(computation, item)
        return self._kernels[item]

    def _executed(self, computation: Computation, item: Instruction) -> Executed | None:
        kernel = kernel_of(item, [computation[name].shape for name in item.operands])
        if kernel is None:
            return None
        table = self._constants.behind(computation, computation.operand(item, TABLE))
        try:
            literal = ELIDED if table is None else table.literal
            return kernel.executed(literal, self.masks)
        except HloError as error:
            raise error.at(item.line) from None

    def matmuls(self, computation: Computation, item: Instruction) -> tuple[Matmul, ...]:
        """Return the matmuls of an instruction, those inside a fusion too."""
        if item.opcode in ("dot", "convolution"):
            lhs, rhs = (computation[name].shape for name in item.operands)
            return (matmul_of(item, lhs, rhs),)
        if kernel := self.kernel(computation, item):
            return kernel.matmuls
        if item.opcode == "custom-call":
            product = grouped_of(item, [computation[name].shape for name in item.operands])
            return () if product is None else (product,)
        if item.opcode not in ("fusion", "call"):
            return ()
        inner = self.module.called(item)
        if inner.name not in self._matmuls:
            self._matmuls[inner.name] = tuple(
                found
                for instruction in inner.instructions.values()
                for found in self.matmuls(inner, instruction)
            )
        return self._matmuls[inner.name]

    def moves_only(self, item: Instruction) -> bool:
        """Return whether an instruction computes nothing but lays an array out anew."""
        if item.opcode != "fusion":
            return item.opcode in _MOVES
        inner = [x.opcode for x in self.module.called(item).instructions.values()]
        return any(code in _MOVES for code in inner) and all(
            code in FREE or code in _MOVES for code in inner
        )

    def collectives_inside(self, item: Instruction) -> list[Instruction]:
        """Return the collectives inside a fusion."""
        if item.opcode != "fusion":
            return []
        inner = self.module.called(item)
        return [x for x in inner.instructions.values() if x.opcode in KINDS]

    def hbm_bytes(self, computation: Computation, item: Instruction) -> float:
        """Return the bytes that cross HBM, padding included.

        Of an array that is only sliced the slices are read, of one that is updated in place only
        the update is read and written. Attention kernels read some operands again and again.
        """
        if kernel := self.kernel(computation, item):
            return kernel.hbm_bytes
        if item.opcode in ("fusion", "call"):
            inner = self.module.called(item)
            read = sum(
                self._read(inner, name)
                for name, operand in zip(inner.parameters, item.operands, strict=True)
                if computation[operand].shape.hbm_bytes
            )
            return read + self._written(inner, inner.root, item.shape)
        shapes = [computation[name].shape for name in item.operands]
        if item.opcode in _SLICES:
            return (2.0 if shapes[0].hbm_bytes else 1.0) * item.shape.hbm_bytes
        if item.opcode == "dynamic-update-slice":
            inside = shapes[1].padded_bytes if item.shape.memory_space == HBM else 0.0
            return shapes[1].hbm_bytes + inside
        return sum(shape.hbm_bytes for shape in shapes) + item.shape.hbm_bytes

    def _read(self, computation: Computation, name: str) -> float:
        """Return the bytes that a computation reads of what it names `name`."""
        whole = computation[name].shape.padded_bytes
        total = 0.0
        for user in computation.users[name]:
            if user.opcode in _SLICES and user.operands[0] == name:
                total += user.shape.padded_bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode == "tuple":  # handed on as it is
                continue
            elif user.opcode == "bitcast" or self._same_place(user):
                total += self._read(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.module.called(user)
                pairs = zip(inner.parameters, user.operands, strict=True)
                total += sum(self._read(inner, mine) for mine, given in pairs if given == name)
            elif user.opcode not in KINDS:
                return whole
        return min(total, whole)

    def _same_place(self, item: Instruction) -> bool:
        """Return whether a fusion inside another gives its operand where it lies, tiled anew."""
        aliased = item.attributes.get("output_to_operand_aliasing") == "{{}: (0, {})}"
        return aliased and len(item.operands) == 1 and self.moves_only(item)

    def _written(self, computation: Computation, name: str, shape: Shape) -> float:
        """Return the bytes that a computation's result `name` of `shape` writes to HBM."""
        item = computation[name]
        if item.opcode == "tuple":
            pairs = zip(item.operands, shape.elements, strict=True)
            return sum(self._written(computation, operand, part) for operand, part in pairs)
        if not shape.hbm_bytes or item.opcode in ("parameter", *KINDS):
            return 0.0
        if item.opcode == "bitcast":
            source = computation.operand(item, 0)
            if source.opcode in ("dynamic-update-slice", "fusion", "bitcast"):
                return self._written(computation, source.name, shape)
        if item.opcode == "fusion":
            inner = self.module.called(item)
            return self._written(inner, inner.root, shape)
        if item.opcode == "dynamic-update-slice":
            return computation.operand(item, 1).shape.padded_bytes
        return shape.hbm_bytes
