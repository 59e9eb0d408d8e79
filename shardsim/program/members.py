"""The parts of a model on one kind of mesh: each with its work, sizes and derived blocks."""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.graph.build import Part
from shardsim.model.blocks import Layer
from shardsim.plan.layout import Layout
from shardsim.program.blocks import Blocks, derived_blocks
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of


@dataclass(frozen=True)
class PartOf:
    """One stack of a model and its ends."""

    name: str
    work: Workload
    sizes: Sizes
    derived: Blocks

    @property
    def as_layer(self) -> Layer:
        """What tasks of its ends are named after."""
        return Layer(self.name, Part((), ()))


def parts_of(work: Workload, layout: Layout) -> tuple[PartOf, ...]:
    """Return the parts of a model, in order."""
    return tuple(
        PartOf(
            part.name,
            one,
            Sizes(one, layout),
            derived_blocks(one.model, one.attention, kind_of(one.model, layout)),
        )
        for part, one in zip(work.model.parts, work.parts, strict=True)
    )
