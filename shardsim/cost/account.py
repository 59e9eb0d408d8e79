"""What one device's HBM holds over a step, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce

import numpy as np

from shardsim.cost.microbatches import GATHERED, Microbatches
from shardsim.graph.arrays import Array
from shardsim.graph.place import Kind
from shardsim.machine import Chip, Machine
from shardsim.ops.attend import KERNELS
from shardsim.plan.layout import REPLICATED, Layout, Number
from shardsim.plan.optimizer import state_bytes
from shardsim.plan.split import stored_elements
from shardsim.program.at_once import head_at_once, layer_at_once
from shardsim.program.blocks import Run, derived_blocks, first_alike, over_policies, runs
from shardsim.program.holds import Passes
from shardsim.program.kept import brought_back, kept_by_run
from shardsim.program.liveness import (
    RINGS,
    Ends,
    Mode,
    ends_trace,
    forward_trace,
    layer_trace,
)
from shardsim.program.once import in_phases
from shardsim.program.shapes import Workload
from shardsim.program.sized import WIDE, stored
from shardsim.program.sizes import Sizes, kind_of
from shardsim.program.trace import Live, Measure, Trace


@dataclass(frozen=True, kw_only=True)
class Held:
    """Something in HBM at the peak."""

    name: str
    size_bytes: float


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
class Account:
    """All that HBM holds over a step, by name."""

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
        """Whole weights of the round of layers that the backward pass begins with, which are
        gathered while the head runs (gemma2-9b on v5e and v6e, palm-8b on v4)."""
        run, layout = self.runs[-1], self.layout
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
        own = stored_elements(self.work.model.trained_tensors, self.layout, state=True)
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
        if self.work.forward_only:
            return [(0.0, 0.0) for _ in self.runs]
        times, narrow = self.microbatches.in_flight, self._narrow_bytes
        sizes = [measure.sizes for measure in self.measures]
        found = (kept_by_run(run, self.layout, sizes[run.part], narrow) for run in self.runs)
        return [(here * times, away * times) for here, away in found]

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

    @property
    def quiet(self) -> Number:
        """Whether layers gather and sum nothing but weights."""
        layout = self.layout
        split = layout.tensor.size * layout.tensor2.size * layout.context.size
        return np.less_equal(split * layout.expert.size, 1)

    def by_mode(self, value: Callable[[Mode], Number]) -> Number:
        """Return a value that depends on what runs as a ring, and on what is prefetched."""

        def of_ring(ring: bool) -> Number:
            name = RINGS.get(self.kind.residual, "") if ring else ""
            return _where(
                self.layout.weights_overlap,
                lambda prefetch: _where(
                    self.quiet, lambda quiet: value(Mode(name, prefetch, quiet))
                ),
            )

        return _where(self.ring, of_ring)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The layers, in runs of those that are alike."""
        every = self.work.forward_only
        return tuple(run for run in runs(self.work, self.layout) if run.trained or every)

    @property
    def casts(self) -> bool:
        """Whether weights are stored in more bytes than products read."""
        return self.work.parameter_bytes > self.work.wire_bytes

    def traces(self, run: Run, names: frozenset[str], mode: Mode) -> list[Trace]:
        """Return the moments of a layer of each kind."""
        work, kind = run.work, self.kinds[run.part]
        alike = [first_alike(work.model, work.attention, number) for number, _ in run.layers]
        numbers = list(dict.fromkeys(alike))
        if work.forward_only:
            return [
                forward_trace(work.model, work.attention, number, kind, self.passes, mode)
                for number in numbers
            ]
        found = [
            layer_trace(work.model, work.attention, number, kind, names, self.passes, mode)
            for number in numbers
        ]
        if self.passes.at_once:
            layers = run.rounds * sum(layer.times for _, layer in run.layers)
            several = bool(np.any(np.greater(layers, 1)))
            found += [
                layer_at_once(work.model, work.attention, number, kind, names, self.casts, several)
                for number in numbers
            ]
        return found

    def ends(self, mode: Mode) -> Ends:
        """Return the moments of the head."""
        if self.work.forward_only:
            model, attention = self.work.model, self.work.attention
            trace = forward_trace(model, attention, None, self.kind, self.passes, mode)
            return Ends(trace=trace, late=())
        return ends_trace(self.work.model, self.work.attention, self.kind, self.passes, mode.ring)

    @cached_property
    def at(self) -> tuple[Number, Number]:
        """Bytes in use at `MOMENTS`."""
        head = self.of_head
        if self.passes.head_late == "synchronous" and np.any(self.late):
            head = head + self.late * self.written
        return sum(self.held(0).values()) + self.of_layers, head

    @cached_property
    def written(self) -> Number:
        """Bytes that the head has more where its gradients of weights are late.

        The gradient of logits is written beside them, to wait; where nothing waits it is made in
        the matmuls that read it (llama3-8b on tpu7x and on v6e). The weight's is not there yet.
        """

        def gradients(mode: Mode) -> Number:
            late = [array for array in self.ends(mode).late if array.name.startswith("d ")]
            return self.measure.total(late)

        return self.by_mode(gradients) - np.greater(self.layout.gather.size, 1) * self.table

    @cached_property
    def table(self) -> Number:
        """Bytes of a whole vocabulary table, or of its gradient; none without a vocabulary."""
        tables = [tensor for tensor in self.work.model.tensors if "vocab" in tensor.axes][:1]
        whole = stored_elements(tables, self.layout) * self.layout.gather.size
        return whole * self.work.wire_bytes if tables else 0.0

    @cached_property
    def of_head(self) -> Number:
        """Bytes in use while the head runs.

        In tiles, of as many tokens each, it has the stream of all of them besides, and its
        gradient.
        """
        tiles = self.work.vocab_tiles
        measure, besides = self.measure, 0.0
        if tiles > 1:
            measure = measure_of(self.machine.chip, self.work, self.layout, tiles)
            head = derived_blocks(self.work.model, self.work.attention, self.kind).ends
            besides = 2.0 * self.measure(stored(head.steps[0].op.out))
        peak = self.by_mode(
            lambda mode: measure.peak(self.ends(mode).trace) + self.measure.total(self.empty(mode))
        )
        if self.passes.at_once:
            work = self.work
            there = head_at_once(work.model, work.attention, self.kind, self.casts)
            peak = np.maximum(peak, measure.peak(there))
        return sum(self.held(1).values()) + peak + besides

    def empty(self, mode: Mode) -> list[Live]:
        """Return the empty arrays of the layers' rings, which the head finds there as well."""
        if self.passes.ring_empty != "every":
            return []
        run = self.runs[-1]
        trace = self.traces(run, run.kept.names[0], mode)[0]
        many = run.stack.round_layers
        return [replace(array, times=array.times * many) for array in trace.empty]

    @cached_property
    def of_layers(self) -> Number:
        """The most that a layer of any kind has at once, less what it finds let go: what the groups
        of layers after its own kept."""

        def peak(run: Run, names: frozenset[str], mode: Mode) -> Number:
            measure = self.measures[run.part]
            traces = self.traces(run, names, mode)
            return reduce(np.maximum, map(measure.peak, traces)) + self.empty_of_others(
                run, traces[0]
            )

        def of(run: Run) -> Number:
            return over_policies(
                run.kept, lambda names: self.by_mode(lambda mode: peak(run, names, mode))
            )

        found = [of(run) - later for run, later in zip(self.runs, self.let_go, strict=True)]
        return reduce(np.maximum, found)

    def empty_of_others(self, run: Run, trace: Trace) -> Number:
        """Return the bytes that the other layers of a round have empty for their rings: they are
        there all through the loop over rounds (gemma2-9b, of two layers a round)."""
        empty = self.measures[run.part].total(trace.empty)
        return empty * (run.stack.round_layers - 1)

    @property
    def let_go(self) -> list[Number]:
        """What the groups of layers after each group kept, of the same stack: the end of another
        stack waits for gradients of its weights (t5-xxl on v4, siglip-so400m on v5e)."""
        found = [*zip(self.runs, self.by_group, strict=True)]
        return [
            sum((kept for later, kept in found[number + 1 :] if later.part == run.part), 0.0)
            for number, (run, _) in enumerate(found)
        ]

    @cached_property
    def late(self) -> Number:
        """Whether the head's gradients of weights are computed after the layers."""
        rule, model = self.passes.head_late, self.work.model
        beside = self.machine.chip.offloads_collectives & np.asarray(self.layout.weights_overlap)
        late = np.greater(self.layout.tensor.size, 1) | beside | (len(self.measures) > 1)
        if rule == "tensor":
            return late if model.vocab else late & ~self.ring
        if rule != "synchronous" or not model.vocab:
            return np.zeros((), dtype=bool)
        if self.work.vocab_tiles > 1:
            return np.zeros((), dtype=bool)
        if self.work.asynchronous or self.work.attention == "unfused":
            return late
        at_once = sum(self.held(0, np.zeros((), dtype=bool)).values()) + self.of_layers
        return late | np.less_equal(self.of_head, at_once)

    def held(self, moment: int, late: Number | None = None) -> dict[str, Number]:
        """Return what is there all through a moment of `MOMENTS`, the head being as `late`."""
        work, layout, passes = self.work, self.layout, self.passes
        gathered = np.greater(layout.gather.size, 1)
        found = {
            "parameters": self.parameters_bytes,
            "optimizer state": self.optimizer_bytes,
            "kept activations": self.activations_bytes,
            "gradients": self.gradients_bytes,
        }
        if work.offload_optimizer and moment == 0:
            found["optimizer state from the host"] = self.passes.fetched * self.state_bytes
        if work.offload_parameters:  # those of one layer: what it gathers is in another format
            found["parameters from the host"] = self.fetched_bytes
        if passes.ahead_from_host and moment == 0:
            found["fetched ahead from the host"] = self.of_one_layer
        if passes.brings_back:
            found["brought back from the host"] = self.brought_back
        if passes.gathers_ahead > 1 and moment == 1 and not work.forward_only:
            ahead = np.logical_not(in_phases(layout)) * self.gathered_ahead
            found["weights of the first round back"] = ahead
        if moment == 1:  # the sums of the microbatches before
            several = self._several & (not self.work.forward_only)
            summed = self.microbatches.summed(self.trained) * np.logical_not(in_phases(layout))
            found["gradients"] = summed * self.work.gradient_bytes * several
        found |= self.microbatches.held(moment)
        if moment == 1 and GATHERED in found:  # the head's is among what it gathers
            found[GATHERED] = np.maximum(found[GATHERED] - self.table, 0.0)
        if passes.cast_ahead and work.parameter_bytes > work.weight_wire_bytes:
            ahead = self.elements - self.away
            found["weights cast ahead"] = gathered * ahead * work.weight_wire_bytes
        if moment == 0:
            late = self.late if late is None else late
        if passes.tables and late is not None and work.model.vocab and work.vocab_tiles == 1:
            waits = gathered & np.logical_not(late)
            if passes.tables_leave and not work.model.tied_embeddings:
                waits = waits & np.asarray(layout.weights_overlap)
            wide = WIDE / self.work.wire_bytes if passes.wide_tables else 1.0
            found["whole vocabulary tables"] = waits * passes.tables * self.table * wide
        if len(self.measures) > 1 and moment == 1:
            found["tokens of other stacks"] = sum(map(self._handed, range(len(self.measures) - 1)))
        if moment == 0 and passes.pooled_waits and not work.model.vocab:
            waits = np.logical_not(late) & (
                np.logical_not(self.ring) & self.quiet | layout.partitioned
            )
            found["left by the head"] = waits * self.by_mode(self.pooled)
        if late is not None and np.any(late):
            found["the head's operands"] = late * self.by_mode(
                lambda mode: self.measure.total(self.ends(mode).late)
            )
        return found

    def pooled(self, mode: Mode) -> Number:
        """Return the bytes that a head that pools by attention leaves to the first layer back: the
        stream and its keys, which its gradients of weights read, and more of these than one."""
        ends = self.ends(mode)
        read = [array for array in ends.late if array.name == "final, for the head"]
        whole = [np.asarray(self.measure(array.size)) for array in ends.whole]
        if not whole or not (mode.prefetch and mode.quiet) or mode.ring:
            return 2.0 * self.measure.total(read)
        apart = np.less_equal(self.layout.data.size, 1) & np.logical_not(self.layout.partitioned)
        one = reduce(np.maximum, whole)
        return 2.0 * self.measure.total(read) + apart * (sum(whole) - one)

    def _handed(self, part: int) -> Number:
        """Return the bytes of what a part hands to others."""
        work = self.work.parts[part]
        steps = derived_blocks(work.model, work.attention, self.kinds[part]).ends.steps
        arrays = [step.op.out for step in steps if step.op.out.handed]
        return sum(self.measures[part](stored(array)) for array in arrays)

    def listed(self, moment: int, peak_bytes: float) -> list[Held]:
        """Return all that a single plan's HBM holds at its fullest at a moment of `MOMENTS`; what
        the compiler does without when memory is scarce is taken off in the end."""
        name = RINGS.get(self.kind.residual, "") if bool(self.ring) else ""
        mode = Mode(name, bool(self.layout.weights_overlap), bool(self.quiet))
        trace, gone, measure = self.ends(mode).trace, 0.0, self.measure
        if moment == 0:
            found = [
                (trace, float(later), self.measures[run.part])
                for run, later in zip(self.runs, self.let_go, strict=True)
                for trace in self.traces(run, run.kept.names[0], mode)
            ]
            trace, gone, measure = max(found, key=lambda one: float(one[2].peak(one[0])) - one[1])
        _, there = trace.at_peak(measure)
        sizes = {"kept activations": -gone}
        for held, size in [*self.held(moment).items(), *there]:
            sizes[held] = sizes.get(held, 0.0) + float(size)
        if moment == 1:
            for array in self.empty(mode):
                sizes[array.name] = float(self.measure(array.size)) * array.times
        if moment == 1 and self.passes.head_late == "synchronous" and bool(self.late):
            sizes["gradient of logits, for the head"] = float(self.written)
        listed = [Held(name=held, size_bytes=size) for held, size in sizes.items() if size]
        rest = peak_bytes - sum(held.size_bytes for held in listed)
        if abs(rest) > 1e-9 * peak_bytes:
            listed.append(Held(name="not there together, for want of room", size_bytes=rest))
        return listed


def _where(flag: Number, value: Callable[[bool], Number]) -> Number:
    """Return the value of a flag; of both where plans differ in it."""
    if np.all(flag):
        return value(True)
    if not np.any(flag):
        return value(False)
    return np.where(flag, value(True), value(False))
