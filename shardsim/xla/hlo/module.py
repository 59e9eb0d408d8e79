"""A program as HLO has it: a module of computations of instructions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.frames import Frames
from shardsim.xla.hlo.shapes import Shape


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    literal: str  # of a constant or parameter: what stands in its parentheses
    attributes: dict[str, str]  # all but the two below
    op_name: str  # where the operation comes from, as JAX names it
    stack_frame_id: int  # 0: none
    backend_config: dict[str, Any]
    is_root: bool
    line: int

    def attribute(self, name: str) -> str:
        """Return an attribute that must be there."""
        if name not in self.attributes:
            raise HloError(f"%{self.name}: {self.opcode} without {name}", self.line)
        return self.attributes[name]

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return an attribute like `{0,2}` as numbers; empty where it is not given."""
        text = self.attributes.get(name, "{}")
        numbers = [small_number(part, -1) for part in text.strip("{}").split(",") if part]
        if min(numbers, default=0) < 0:
            raise HloError(f"%{self.name}: {name}={text[:40]}", self.line)
        return tuple(numbers)

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that the instruction names."""
        found = []
        for key in ("calls", "to_apply", "body", "condition", "true_computation"):
            if key in self.attributes:
                found.append(self.attributes[key])
        for key in ("false_computation", "branch_computations", "called_computations"):
            if key in self.attributes:
                found += self.attributes[key].strip("{}").split(", ")
        return tuple(name.removeprefix("%") for name in found)

    def config(self, *names: str) -> Any:
        """Return an entry of the backend_config, or None where there is none."""
        found: Any = self.backend_config
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @property
    def cycles(self) -> int | None:
        """What the compiler estimates the operation to take; None where it says nothing."""
        value = self.config("window_config", "estimated_cycles")
        if value is None:
            return None
        cycles = small_number(str(value), -1, digits=15)
        if cycles < 0:
            raise HloError(f"%{self.name}: estimated_cycles {str(value)[:40]!r}", self.line)
        return cycles


@dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in order; in a scheduled module the order of execution."""

    name: str
    instructions: dict[str, Instruction]
    parameters: tuple[str, ...]
    root: str
    line: int

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """Return the instruction that gives an operand."""
        if index >= len(instruction.operands):
            raise HloError(f"%{instruction.name} lacks operands", instruction.line)
        return self.instructions[instruction.operands[index]]

    def behind(self, name: str) -> str:
        """Return what gives a value, through tuples that only hold it."""
        while (item := self.instructions[name]).opcode == "get-tuple-element":
            source = self.instructions[item.operands[0]]
            if source.opcode != "tuple":
                break
            name = source.operands[int(item.attribute("index"))]
        return name

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclass(frozen=True, eq=False)
class Module:
    """A whole program."""

    name: str
    is_scheduled: bool
    partitions: int | None  # devices that run it, where the text says so
    replicas: int
    computations: dict[str, Computation]
    entry: str
    frames: Frames = field(repr=False)

    @cached_property
    def homes(self) -> dict[Instruction, Computation]:
        """The computation that each instruction stands in."""
        return {
            instruction: computation
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
        }

    def called(self, instruction: Instruction) -> Computation:
        """Return the one computation that a fusion or a call runs."""
        names = instruction.called
        if len(names) != 1:
            raise HloError(f"%{instruction.name} must call one computation", instruction.line)
        return self.computations[names[0]]
