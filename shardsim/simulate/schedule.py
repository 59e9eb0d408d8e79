"""A Program as the scripts that chips run: one for all, or one for every pipeline stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shardsim.cost.costs import Costs
from shardsim.cost.network import Group
from shardsim.plan.layout import Layout
from shardsim.program.tasks import Block, Program
from shardsim.simulate.operations import Receive, Schedule, Script, Send, Spec, Step, Unit
from shardsim.simulate.pipeline import Turn, one_forward_one_backward
from shardsim.simulate.writing import Writer


def schedule(
    costs: Costs, layout: Layout, program: Program, links: Mapping[str, Group]
) -> Schedule:
    """Return what every chip does in a step of `program`."""
    blocks = {block.name: block for block in program.blocks}
    scribe = _Scribe(Writer(costs, layout, program, links), layout, blocks)
    stages = int(layout.pipeline.size)
    scripts = tuple(_script(tuple(scribe.steps(stage)), scribe.units) for stage in range(stages))
    return Schedule(units=tuple(scribe.units), scripts=scripts, legs=scribe.legs)


def _script(steps: Sequence[Step], units: Sequence[Unit]) -> Script:
    """Return the steps and where gathers start: one layer ahead."""
    issue: dict[int, tuple[int, ...]] = {}
    latest = -1
    for place, step in enumerate(steps):
        unit = units[step.unit]
        if unit.prefetch:
            at = latest if latest >= 0 else place
            issue[at] = (*issue.get(at, ()), place)
        if unit.phase in ("forward", "backward"):
            latest = place
    return Script(steps=tuple(steps), issue=issue)


@dataclass(frozen=True, kw_only=True)
class _Variants:
    """A block as a unit: as it is, and with the reductions that start behind the last one."""

    usual: int
    last: int


class _Scribe:
    """Writes the steps of every stage."""

    def __init__(self, writer: Writer, layout: Layout, blocks: Mapping[str, Block]) -> None:
        self.units: list[Unit] = []
        self.stages = int(layout.pipeline.size)
        self.microbatches = int(layout.microbatches)
        boundary = blocks["stage boundary"]
        interleave = round(float(boundary.trips)) // self.microbatches
        self.chunks = interleave if self.stages > 1 else 1
        layers = round(float(blocks["layer forward"].trips)) // self.microbatches
        self.layers = layers // self.chunks  # of one chunk
        self.forward = self._add(writer.unit(blocks["layer forward"]))
        head = writer.unit(blocks["embedding and head"])
        backward = writer.unit(blocks["layer backward"])
        reductions = [block for block in blocks.values() if block.phase == "reduction"]
        afterwards = [writer.unit(block) for block in reductions]
        # Gradients are complete in the last microbatch, and what may run behind it starts there.
        self.backward = self._variants(backward, writer.reductions.get("gradient reduction", ()))
        self.head = self._variants(head, writer.reductions.get("end gradient reduction", ()))
        self.finish: list[Step] = []
        for block, unit in zip(reductions, afterwards, strict=True):
            if unit.ops:
                self.finish += [Step(unit=self._add(unit))] * round(float(block.trips))
        self.finish.append(Step(unit=self._add(writer.unit(blocks["update"]))))
        self.send: Spec | None = None
        if self.stages > 1:
            spec = writer.spec(next(boundary.collectives()))
            assert spec is not None
            self.send = replace(spec, repeat=1)
            writer.legs["pipeline"] = set()
        self.legs = writer.legs

    def steps(self, stage: int) -> Iterator[Step]:
        """Yield what the chips of a stage do in order.

        The head runs on the last stage only, with the embedding, as the cost model has it.
        """
        last = self.stages * self.chunks - 1
        passing = [self._passing(stage, way) for way in (1, -1)] if self.stages > 1 else []
        for turn in one_forward_one_backward(self.stages, stage, self.microbatches, self.chunks):
            final = turn.microbatch == self.microbatches - 1
            place = turn.chunk * self.stages + stage
            start, end, way = (0, last, 1) if turn.forward else (last, 0, -1)
            if place != start:
                yield self._message(passing, turn, place, way, arriving=True)
            if turn.forward:
                yield from [Step(unit=self.forward)] * self.layers
                if place == last:
                    yield Step(unit=self.head.last if final else self.head.usual)
            else:
                unit = self.backward.last if final else self.backward.usual
                yield from [Step(unit=unit)] * self.layers
            if place != end:
                yield self._message(passing, turn, place + way, way, arriving=False)
        yield from self.finish

    def _message(
        self, passing: list[tuple[int, int]], turn: Turn, target: int, way: int, *, arriving: bool
    ) -> Step:
        """Return the sending or receiving of a microbatch at a place in the pipeline."""
        units = passing[0 if way == 1 else 1]
        number = turn.microbatch * self.stages * self.chunks + target
        return Step(unit=units[0 if arriving else 1], message=number)

    def _passing(self, stage: int, way: int) -> tuple[int, int]:
        """Return the units that receive and send one way at a stage."""
        assert self.send is not None
        name = "next" if way == 1 else "back"
        leg, before = f"{name}:{stage}", f"{name}:{(stage - way) % self.stages}"
        if self.chunks > 1 or 0 <= stage + way < self.stages:
            self.legs["pipeline"].add(leg)
        wait = Unit(name="wait for a stage", phase="boundary", ops=(Receive(leg=before),))
        send = Unit(name="send to a stage", phase="boundary", ops=(Send(spec=self.send, leg=leg),))
        return self._add(wait), self._add(send)

    def _variants(self, unit: Unit, reduce: tuple[Spec, ...]) -> _Variants:
        return _Variants(usual=self._add(unit), last=self._add(replace(unit, reduce=reduce)))

    def _add(self, unit: Unit) -> int:
        self.units.append(unit)
        return len(self.units) - 1
