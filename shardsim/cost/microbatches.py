"""What HBM holds because of how microbatches follow each other: over stages, or by layers, or with
weights that stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardsim.graph.derive import Derived
from shardsim.graph.place import Kind
from shardsim.plan.layout import Layout, Number
from shardsim.program.blocks import Blocks, Run, derived_blocks
from shardsim.program.kept import operands_of_weights
from shardsim.program.once import in_phases
from shardsim.program.shapes import Workload
from shardsim.program.sized import stored
from shardsim.program.trace import Measure

GATHERED = "weights gathered for the step"
WAITING = "operands of gradients of weights that wait"


@dataclass(frozen=True)
class Microbatches:
    """The microbatches of a step; of a model of several stacks, those of its last one."""

    work: Workload
    layout: Layout
    kind: Kind
    measure: Measure
    runs: tuple[Run, ...]

    @property
    def _blocks(self) -> Blocks:
        return derived_blocks(self.work.model, self.work.attention, self.kind)

    @cached_property
    def whole(self) -> tuple[Number, Number]:
        """Parameters of one device once they are gathered: of the layers, and of the ends."""

        def of(block: Derived) -> Number:
            weights = [leaf.array for leaf in block.leaves if leaf.array.weight]
            return sum(self.measure.sizes.gathered(array) for array in weights)

        layers = sum(
            of(self._blocks.layers[number]) * (run.rounds * layer.times)
            for run in self.runs
            for number, layer in run.layers
        )
        return layers, of(self._blocks.ends)

    def summed(self, own: Number) -> Number:
        """Return the elements of gradients that are summed over microbatches; a device's `own`,
        unless they are scattered only afterwards.

        Of a stage with several chunks, microbatches that are one group (`turns.only_forward`) all
        come back through one chunk before the next, whose sums are not there before those of the
        other are scattered.
        """
        layout, later = self.layout, self.layout.summed_whole
        if not np.any(later):
            return own
        layers, ends = self.whole
        group = np.less(layout.microbatches, 2 * layout.pipeline.size) & self.by_turns
        chunks = np.where(group, self.work.pipeline_interleave, 1)
        return np.where(later, layers / chunks + ends, own)

    @property
    def by_turns(self) -> Number:
        """Whether stages run turn by turn, each adding a layer's gradients to the sums as they
        come, as PyTorch and Megatron do."""
        layout = self.layout
        return np.greater(layout.pipeline.size, 1) & np.logical_not(layout.lockstep)

    @property
    def in_flight(self) -> Number:
        """Microbatches of which a layer keeps something, the most there are at once.

        Of several chunks a stage has more under way until the first gradient comes back (arXiv
        2104.04473, section 2.2). In a loop of ticks all are, and those that it runs on nothing;
        in turns the first stage has room for those on their way to the last one and back.
        """
        layout, chunks = self.layout, self.work.pipeline_interleave
        stages, many = layout.pipeline.size, layout.microbatches
        more = (stages - 1) / chunks
        found = np.minimum(stages + more * (chunks > 1), many)
        if layout.stage_layers:  # stage s has P - s of them under way
            most = max(layout.stage_layers)
            parts = [
                np.minimum(stages - stage, many) * own / most
                for stage, own in enumerate(layout.stage_layers)
            ]
            found = max(parts)
        found = np.where(layout.lockstep, many + more, found)
        # In turns a stack has so many places, and a tick's is made before it is put in its own.
        found = np.where(layout.in_turns, 2 * stages, found)
        return np.where(layout.layered, many, found)

    @property
    def waiting(self) -> Number:
        """Bytes of what gradients of weights that wait multiply, on the stage that has most of it.

        Stage s of P lets s microbatches wait, beside P - s that it keeps activations of: the last
        one has most, if it is as full as others. In ticks all have room for those and the one at
        hand.
        """
        layout, work = self.layout, self.work
        stages, many = layout.pipeline.size, layout.microbatches
        each = sum(
            operands_of_weights(work, layout, self.measure.sizes, number, run.kept)
            * (run.rounds * layer.times)
            for run in self.runs
            for number, layer in run.layers
        )
        wait = np.minimum(stages - 1, many)
        if layout.stage_layers:
            most = max(layout.stage_layers)
            wait = max(
                min(stage, float(many)) * own / most
                for stage, own in enumerate(layout.stage_layers)
            )
        return np.where(layout.lockstep, stages, wait) * each

    def held(self, moment: int) -> dict[str, Number]:
        """Return what is there all through a moment of `hbm.MOMENTS`, by name."""
        layout, phases = self.layout, in_phases(self.layout)
        waiting = {}
        if np.any(layout.split_backward):
            waiting = {WAITING: self.waiting * layout.split_backward}
        if not np.any(phases | layout.gathered):
            return waiting
        (layers, ends), work = self.whole, self.work
        several = np.greater(layout.microbatches, 1)
        once = np.where(layout.gathered, layers + ends, phases * ends)
        once = once * np.greater(layout.gather.size, 1)
        found = {**waiting, GATHERED: once * work.wire_bytes}
        if np.any(phases):
            # Of a layer that runs all microbatches, what it reads and what it makes; of a head that
            # does, what it reads and its gradients.
            head = phases & np.logical_not(layout.in_turns)
            streams = np.where(layout.layered if moment == 0 else head, 2, 1) * layout.microbatches
            stream = self.measure(stored(self._blocks.ends.steps[0].op.out))
            found["boundaries of all microbatches"] = phases * several * streams * stream
            found["sums of the ends' gradients"] = phases * ends * work.gradient_bytes
        if moment == 0 and np.any(layout.layered):
            rounds = sum(run.rounds for run in self.runs)
            sums = several * layout.layered * layers / rounds * work.gradient_bytes
            found["sums of a layer's gradients"] = sums
        return found
