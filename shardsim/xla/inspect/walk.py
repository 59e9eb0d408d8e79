"""Collectives and copies of a program that has no schedule of a TPU: of a host, a GPU, or undone.

Loops count as often as they can be seen to run, branches all; nothing is said of what runs beside
what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardsim.xla.hlo.collect import CompiledCollective, read_collective
from shardsim.xla.hlo.costs import Costs
from shardsim.xla.hlo.errors import HloError
from shardsim.xla.hlo.kernels import UNKNOWN
from shardsim.xla.hlo.loops import trips_of
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import KINDS
from shardsim.xla.hlo.sources import source_of
from shardsim.xla.hlo.steps import MOST_CALLS

MOST_RUNS = 10**6  # of one instruction in a step
_HOLDERS = frozenset(("call", "conditional", "async-start", "call-start", "fusion-start"))


@dataclass(frozen=True, kw_only=True)
class Laid:
    """An operation that only lays an array out anew."""

    name: str
    source: str
    hbm_bytes: float  # each time
    count: int


@dataclass
class Walk:
    """What a module sends and lays out anew; read once it is made."""

    module: Module
    mesh: Mapping[str, int]
    collectives: list[CompiledCollective] = field(default_factory=list)
    copies: list[Laid] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = Costs(self.module, UNKNOWN)
        self._visits = 0
        self._computation(self.module.computations[self.module.entry], 1)

    def _computation(self, computation: Computation, runs: int) -> None:
        self._visits += 1
        if runs > MOST_RUNS or self._visits > MOST_CALLS:
            raise HloError(f"%{computation.name} runs too often", computation.line)
        for item in computation.instructions.values():
            if item.opcode == "while":
                body = self.module.computations[item.attribute("body").removeprefix("%")]
                self._computation(body, runs * self._trips(computation, item))
            elif self._is_collective(item):
                self._collective(item, runs)
            elif item.opcode in _HOLDERS:
                if item.opcode == "conditional":
                    self.warnings[f"%{item.name}: all of its branches are counted"] = None
                for name in item.called:
                    self._computation(self.module.computations[name], runs)
            elif self._costs.moves_only(item):
                self.copies.append(
                    Laid(
                        name=item.name,
                        source=source_of(self.module, item),
                        hbm_bytes=self._costs.hbm_bytes(computation, item),
                        count=runs,
                    )
                )

    def _is_collective(self, item: Instruction) -> bool:
        if item.opcode in ("fusion", "async-start", "call-start"):
            inside = self.module.called(item).instructions.values()
            return sum(one.opcode in KINDS for one in inside) == 1
        return item.opcode.removesuffix("-start") in KINDS

    def _trips(self, computation: Computation, loop: Instruction) -> int:
        try:
            return trips_of(self.module, computation, loop).count
        except HloError:
            self.warnings[f"how often the loop %{loop.name} runs is not known: counted once"] = None
            return 1

    def _collective(self, item: Instruction, runs: int) -> None:
        found = read_collective(
            self.module,
            item,
            self.mesh,
            block="",
            count=runs,
            asynchronous=item.opcode.endswith("-start"),
        )
        if found is not None:
            self.collectives.append(found)
