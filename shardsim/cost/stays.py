"""What stays in one device's HBM over a step: state, gradients, kept activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from math import prod

import numpy as np

from shardsim.cost.microbatches import Microbatches
from shardsim.graph.arrays import Array
from shardsim.graph.place import Kind
from shardsim.machine import Chip, Machine
from shardsim.ops.attend import KERNELS
from shardsim.plan.layout import REPLICATED, Layout, Number
from shardsim.plan.optimizer import bytes_of_each, state_bytes
from shardsim.plan.split import stored_elements
from shardsim.plan.tiles import filled, unfilled_elements, unfilled_rows
from shardsim.program.blocks import Run, derived_blocks, runs
from shardsim.program.holds import Passes
from shardsim.program.kept import as_it_is, brought_back, kept_by_run
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of
from shardsim.program.trace import Measure

PATCHES = "patch_embedding"  # the matrix that reads images
FLOAT32_BYTES = 4.0


def measure_of(chip: Chip, work: Workload, layout: Layout, tiles: int = 1) -> Measure:
    """Return bytes of arrays on one device, of a microbatch or of one of its `tiles`."""
    fused = KERNELS.get(work.attention)
    how = "kernel" if fused and fused.beside else "rows"
    return Measure(
        Sizes(work, layout, tiles),
        float(work.wire_bytes),
        float(work.reduce_bytes),
        float(work.weight_wire_bytes),
        how if chip.kind == "tpu" else "",
    )


@dataclass(frozen=True)
class Stays:
    """What stays in HBM over a step: weights, state, gradients, and what layers keep."""

    machine: Machine
    work: Workload
    layout: Layout
    passes: Passes
    # Of arrays that all ways of using HBM share, of each part of the model.
    measures: tuple[Measure, ...] = field(repr=False)

    @property
    def measure(self) -> Measure:
        """Of arrays of the last part, which has the head."""
        return self.measures[-1]

    @cached_property
    def kind(self) -> Kind:
        """How arrays of the last part are stored."""
        return self.kinds[-1]

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """How arrays of each part are stored."""
        return tuple(kind_of(part.model, self.layout) for part in self.work.parts)

    @cached_property
    def elements(self) -> Number:
        """Parameters of one device."""
        return stored_elements(self.work.model.tensors, self.layout)

    @cached_property
    def trained(self) -> Number:
        """Those of them that have gradients."""
        return stored_elements(self.work.model.trained_tensors, self.layout)

    @cached_property
    def unfilled_bytes(self) -> Number:
        """Bytes of tiles that are not full: of weights, their state, gradients and casts, of images
        and of what layers keep."""
        work, model = self.work, self.work.model
        if self.machine.chip.kind != "tpu":
            return 0.0
        layout, outermost = self.layout, self.passes.layers_outermost
        found = self.unfilled_kept_bytes
        for part, images, read in self._images:
            widths = FLOAT32_BYTES + self._several * part.wire_bytes * (read is not None)
            found = found + prod(images) * (filled(images) - 1.0) * widths
        if not work.offload_parameters:
            own = unfilled_elements(model.tensors, layout)
            found = found + own * work.parameter_bytes
            casts = unfilled_elements(model.tensors, layout, by_layer=outermost)
            found = found + casts * self.cast_bytes
        if work.forward_only:
            return found
        trained = model.trained_tensors
        if not work.offload_optimizer:
            each = bytes_of_each(work.optimizer, work.state_element_bytes, work.master_bytes)
            found = found + unfilled_elements(trained, layout, state=True) * each
        stacks = unfilled_elements(trained, layout, state=True, by_layer=outermost)
        if outermost:
            added = self._several & np.logical_not(layout.summed_whole)
            found = found + added * unfilled_rows(trained, layout) * work.gradient_bytes
        return found + stacks * self.gradients_bytes / np.maximum(self.of_state, 1.0)

    @property
    def cast_bytes(self) -> Number:
        """Bytes of an element of weights that are cast once a step, for all layers."""
        work, passes = self.work, self.passes
        if not passes.cast_ahead or work.parameter_bytes <= work.weight_wire_bytes:
            return 0.0
        gathered = np.greater(self.layout.gather.size, 1)
        return work.weight_wire_bytes * (gathered | passes.cast_ungathered)

    @cached_property
    def of_state(self) -> Number:
        """Elements of one moment of each weight on one device."""
        return stored_elements(self.work.model.trained_tensors, self.layout, state=True)

    @property
    def parameters_bytes(self) -> Number:
        """Parameters that lie on the device."""
        return (self.elements - self.away) * self.work.parameter_bytes

    @cached_property
    def away(self) -> Number:
        """Parameters of one device that lie in its host's memory."""
        if not self.work.offload_parameters:
            return 0.0
        fetched = [tensor for tensor in self.work.model.tensors if tensor.fetched]
        return stored_elements(fetched, self.layout)

    @cached_property
    def gathered_ahead(self) -> Number:
        """Whole weights of the layer that the backward pass begins with, which are gathered while
        the head runs (palm-8b on v4; not of rounds of several layers: gemma2-9b on v5e)."""
        run, layout = self.runs[-1], self.layout
        if run.stack.round_layers > 1:
            return 0.0
        whole = self._of_a_round(run, self.measures[run.part].sizes.gathered)
        ahead = np.greater(layout.gather.size, 1) & np.asarray(layout.weights_overlap)
        return (ahead & ~self.ring) * whole * self.work.weight_wire_bytes

    @cached_property
    def fetched_bytes(self) -> Number:
        """The most parameters that a round of layers fetches from the host's memory."""
        rounds = (self._of_a_round(run, self.measures[run.part].sizes.stored) for run in self.runs)
        return reduce(np.maximum, rounds) * self.work.parameter_bytes

    def _of_a_round(self, run: Run, elements: Callable[[Array], Number]) -> Number:
        """Return the elements of the matrices of a round of layers together."""
        blocks = derived_blocks(run.work.model, run.work.attention, self.kinds[run.part])
        return sum(
            layer.times * elements(array)
            for number, layer in run.layers
            for array in blocks.layers[number].weights
            if array.weight == "matrix"
        )

    @property
    def optimizer_bytes(self) -> Number:
        """Optimizer state that lies on the device."""
        return 0.0 if self.work.offload_optimizer or self.work.forward_only else self.state_bytes

    @cached_property
    def state_bytes(self) -> Number:
        """Optimizer state, wherever it lies."""
        work = self.work
        widths = work.state_element_bytes, work.master_bytes
        return state_bytes(work.optimizer, work.model.trained_tensors, self.layout, *widths)

    @cached_property
    def gradients_bytes(self) -> Number:
        """Gradients: with several microbatches, which add to the sums of those before, twice; but
        once where a stage runs turn by turn. Those that are scattered as they come are stacked in
        the sums' format (six programs of vit-bigg, ViT-22B, maxtext-16b and 22b, llama3-8b and
        llama2-7b), those that stay whole in the products' (a Llama with ZeRO-1).

        Gradients that the data axis reduce-scatters as they come are never whole. Where weights
        stay gathered both are of whole weights; where a layer runs all microbatches before the
        next its sum is scattered at once.
        """
        if self.work.forward_only:
            return 0.0
        own = self.of_state
        width = self.work.gradient_bytes
        now = min(width, self.work.reduce_bytes) if self.passes.narrow_gradients else width
        layout = self.layout
        in_place = np.logical_or(self.microbatches.by_turns, self.passes.adds_in_place)
        scattered = np.where(self.layout.summed_whole, now, width)
        beside = np.where(in_place, 0.0, scattered)
        both = self.microbatches.summed(self.trained) * (width + beside)
        found = np.where(self._several, both, own * now)
        return np.where(layout.layered & self._several, self.trained * width, found)

    @cached_property
    def microbatches(self) -> Microbatches:
        """How microbatches follow each other."""
        of = self.work, self.layout, self.kinds[-1], self.measures[-1], self.runs
        return Microbatches(*of)

    @cached_property
    def activations_bytes(self) -> Number:
        """Activations of all layers kept for the backward pass, on the device."""
        return sum(self.by_group)

    @property
    def host_bytes(self) -> Number:
        """Activations, optimizer state and parameters in the host's memory."""
        work, found = self.work, self.away * self.work.parameter_bytes
        if work.offload_optimizer and not work.forward_only:
            found = found + self.state_bytes
        return sum((away for _, away in self._stored), found)

    @property
    def by_group(self) -> list[Number]:
        """Activations kept on the device, of each of `runs`."""
        return [here for here, _ in self._stored]

    @cached_property
    def _stored(self) -> list[tuple[Number, Number]]:
        """Kept activations of each of `runs`, on the device and in the host's memory."""
        return self._kept(in_tiles=False)

    def _kept(self, in_tiles: bool) -> list[tuple[Number, Number]]:
        """Return `_stored`, of the device as tiles hold it or as many elements as there are."""
        if self.work.forward_only:
            return [(0.0, 0.0) for _ in self.runs]
        times, narrow, found = self.microbatches.in_flight, self._narrow_bytes, []
        for run in self.runs:
            measure = self.measures[run.part]
            fills = partial(self._filled, measure) if in_tiles else as_it_is
            found.append(kept_by_run(run, self.layout, measure.sizes, narrow, fills))
        return [(here * times, away * times) for here, away in found]

    def _filled(self, measure: Measure, array: Array) -> Number:
        """Return how many times its elements a kept array takes."""
        ring = self.ring & np.logical_not(self.layout.partitioned)
        return np.where(ring, measure.of_kept(array, ring=True), measure.of_kept(array))

    @cached_property
    def unfilled_kept_bytes(self) -> Number:
        """Bytes of tiles that kept activations do not fill."""
        return sum(here for here, _ in self._kept(in_tiles=True)) - self.activations_bytes

    @property
    def _narrow_bytes(self) -> float:
        """Bytes of an element that products alone read; 0: as of all others."""
        if self.passes.keeps_operands and self.work.compute_bytes == 1:
            return 1.0
        return 2.0 if self.passes.narrow_kept else 0.0

    @cached_property
    def brought_back(self) -> Number:
        """Stacks of what layers keep that are brought back from the host's memory whole; of experts
        none was seen, and mixtral-8x7b ran on v6e with less room than they take."""
        if self.work.forward_only or self.work.model.experts is not None:
            return 0.0
        narrow = self._narrow_bytes
        sizes = [measure.sizes for measure in self.measures]
        found = (brought_back(run, self.layout, sizes[run.part], narrow) for run in self.runs)
        return sum(found, 0.0) * self.microbatches.in_flight

    @cached_property
    def images_bytes(self) -> Number:
        """Images as a step is given them, in float32, and what gradients of patch embeddings read:
        patches in the compute format, and of several microbatches all images in that as well, which
        are cast before their loop (ViT-22B on v4 and v5p, vit-bigg on v5e and vit-h-14 on v4)."""
        found: Number = 0.0
        for work, images, read in self._images:
            found = found + prod(images) * FLOAT32_BYTES
            if read is not None:
                found = found + (read + prod(images) * self._several) * work.wire_bytes
        return found

    @cached_property
    def _images(self) -> list[tuple[Workload, tuple[Number, ...], Number | None]]:
        """Of each part that reads images: the lengths of all that a device is given, and the
        elements of its patches, if a gradient reads them."""
        found: list[tuple[Workload, tuple[Number, ...], Number | None]] = []
        for work, kind, measure in zip(self.work.parts, self.kinds, self.measures, strict=True):
            model, sizes = work.model, measure.sizes
            for step in derived_blocks(model, work.attention, kind).ends.steps:
                if not any(array.name == PATCHES for array in step.op.ins):
                    continue
                split = {axis: d for axis, d in step.place.items() if d == "batch"}
                images = sizes.product(("batch",), split) * self.layout.microbatches
                each = model.frames, model.image, model.width or model.image, model.channels
                trained = step.trained and not work.forward_only
                read = sizes.product(step.op.ins[0].dims, step.place) if trained else None
                found.append((work, (images, *each), read))
        return found

    @property
    def of_one_layer(self) -> Number:
        """The most that a round of layers keeps in the host's memory."""
        times = self.microbatches.in_flight
        pairs = zip(self._stored, self.runs, strict=True)
        return reduce(np.maximum, (away / times / run.rounds for (_, away), run in pairs))

    @property
    def _several(self) -> Number:
        return np.greater(self.layout.microbatches, 1)

    @cached_property
    def ring(self) -> Number:
        """Whether collective matmuls run."""
        layout = self.layout
        ring = np.greater(layout.tensor.size, 1) & np.greater(layout.matmul_overlap, 0)
        return ring & np.not_equal(layout.residual, REPLICATED)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The layers, in runs of those that are alike."""
        every = self.work.forward_only
        return tuple(run for run in runs(self.work, self.layout) if run.trained or every)

    @property
    def casts(self) -> bool:
        """Whether weights are stored in more bytes than products read."""
        return self.work.parameter_bytes > self.work.wire_bytes
