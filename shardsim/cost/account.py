"""What one device's HBM holds while the head and layers run, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce

import numpy as np

from shardsim.cost.microbatches import GATHERED
from shardsim.cost.stays import Stays, measure_of
from shardsim.plan.layout import Number
from shardsim.plan.split import stored_elements
from shardsim.plan.tiles import LANES, ROWS
from shardsim.program.at_once import head_at_once, layer_at_once
from shardsim.program.blocks import Run, derived_blocks, first_as_large, over_policies
from shardsim.program.liveness import (
    RINGS,
    Ends,
    Mode,
    ends_trace,
    forward_trace,
    layer_trace,
)
from shardsim.program.once import in_phases
from shardsim.program.sized import WIDE, stored
from shardsim.program.trace import POSITIONS, Live, Trace

# Of a microbatch on a device. The head's gradients of weights are over too soon to hide a gather of
# the first layer back, and wait: twelve of twelve fully sharded programs with so many or fewer
# (llama2-7b, llama3-8b, gemma-7b, palm-8b, qwen3-14b, gpt-neox-20b, maxtext-16b and 22b); of twice
# as many seven of ten.
FEW_TOKENS = 4096
# Without prefetching, of a parallel block: 4 times in maxtext-22b on v4 and maxtext-16b on v4, v5e
# and v6e, each with 2,048 tokens, whose scores meet no hidden layer; once or twice in nine others,
# where all but maxtext-16b with 1,024 on v4 have it there.
LEAD = 3.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """Something in HBM at the peak."""

    name: str
    size_bytes: float


@dataclass(frozen=True)
class Account(Stays):
    """All that HBM holds over a step, by name."""

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
            return _where(self.by_rows & (name == "sequence"), partial(of_rows, name))

        def of_rows(name: str, rows: bool) -> Number:
            of_weights = partial(of_prefetch, name, rows)
            return _where(self.layout.weights_overlap, of_weights)

        def of_prefetch(name: str, rows: bool, prefetch: bool) -> Number:
            lead = self.scores_lead & (not prefetch)
            return _where(
                self.quiet,
                lambda quiet: _where(
                    lead,
                    lambda leads: value(
                        Mode(name, rows, prefetch, quiet, leads, self.machine.permutes_wait)
                    ),
                ),
            )

        return _where(self.ring, of_ring)

    @property
    def modes(self) -> list[Mode]:
        """How the plans run: of a single one, its only mode."""
        found: list[Mode] = []

        def note(mode: Mode) -> Number:
            found.append(mode)
            return 0.0

        self.by_mode(note)
        return found

    @cached_property
    def scores_lead(self) -> Number:
        """Whether scores in HBM are more than `LEAD` times as large as a parallel block's hidden
        layer: attention then runs back before that is made, or after all of the MLP."""
        work, model = self.work, self.work.model
        if not model.parallel_block or work.attention != "unfused":
            return np.zeros((), dtype=bool)
        steps = derived_blocks(model, work.attention, self.kind).layers[0].steps
        made = [stored(step.op.out) for step in steps if step.op.product]
        hidden = [self.measure(size) for size in made if "mlp" in size.dims]
        pairs = [replace(size, width=WIDE) for size in made if {*POSITIONS} <= {*size.dims}]
        if not hidden or not pairs:
            return np.zeros((), dtype=bool)
        return np.greater(self.measure(pairs[0]), LEAD * hidden[0])

    @property
    def by_rows(self) -> Number:
        """Whether pieces of the sequence lie by rows: there is no second tensor axis."""
        return np.less_equal(self.layout.tensor2.size, 1)

    def traces(self, run: Run, names: frozenset[str], mode: Mode) -> list[Trace]:
        """Return the moments of a layer of each kind."""
        work, kind = run.work, self.kinds[run.part]
        alike = [first_as_large(work.model, work.attention, number) for number, _ in run.layers]
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

    @property
    def both_tables(self) -> Number:
        """Whether the head's table and its gradient are whole at once (`tables_together`)."""
        layout, model = self.layout, self.work.model
        if not model.tied_embeddings or model.round_layers == 1:
            return np.zeros((), dtype=bool)
        several = np.greater(layout.tensor.size * layout.tensor2.size, 1)
        gathered = np.greater(layout.gather.size, 1) & np.asarray(layout.weights_overlap)
        lanes = np.not_equal(np.mod(model.embed / layout.gather.size, ROWS), 0)
        lanes = lanes & (model.vocab % LANES == 0)
        return gathered & ~lanes & ~several & (self.work.vocab_tiles == 1)

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

    @cached_property
    def beside_head(self) -> Number:
        """Bytes that sums over devices take beside what is in use while the head runs."""
        if not self.passes.sums_beside or self.work.forward_only:
            return 0.0
        measure = self.measure
        if self.work.vocab_tiles > 1:
            measure = measure_of(self.machine.chip, self.work, self.layout, self.work.vocab_tiles)

        def largest(mode: Mode) -> Number:
            parts = [
                measure(size) * measure.sizes.several(axes) / measure.sizes.members(axes)
                for size, axes in self.ends(mode).sums
            ]
            return reduce(np.maximum, parts, 0.0)

        return self.by_mode(largest)

    def empty(self, mode: Mode) -> list[Live]:
        """Return the empty arrays of the layers' rings, which the head finds there as well."""
        if self.passes.ring_empty != "every":
            return []
        run = self.runs[-1]
        return [*self.traces(run, run.kept.names[0], mode)[0].empty]

    @cached_property
    def of_layers(self) -> Number:
        """The most that a layer of any kind has at once, less what it finds let go: what the groups
        of layers after its own kept."""

        def peak(run: Run, names: frozenset[str], mode: Mode) -> Number:
            measure = self.measures[run.part]
            return reduce(np.maximum, map(measure.peak, self.traces(run, names, mode)))

        def of(run: Run) -> Number:
            return over_policies(
                run.kept, lambda names: self.by_mode(lambda mode: peak(run, names, mode))
            )

        found = [of(run) - later for run, later in zip(self.runs, self.let_go, strict=True)]
        return reduce(np.maximum, found)

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
        beside = self.machine.chip.offloads_collectives | (len(self.measures) > 1)
        late = np.greater(self.layout.tensor.size, 1) | beside
        if rule == "tensor":
            if not model.vocab:
                return late & ~self.ring
            synchronous = np.logical_not(self.layout.weights_overlap) & ~self.ring
            late = late & np.logical_not(synchronous & np.greater(self.layout.gather.size, 1))
            late = late | beside | (self.few_tokens & (self.work.vocab_tiles == 1))
            in_rings = self.passes.head_late_in_rings | beside | self.layout.partitioned
            return late & (np.logical_not(self.ring) | in_rings)
        if rule != "synchronous" or not model.vocab:
            return np.zeros((), dtype=bool)
        if self.work.vocab_tiles > 1:
            return np.zeros((), dtype=bool)
        if self.work.asynchronous or self.work.attention == "unfused":
            return late
        at_once = sum(self.held(0, np.zeros((), dtype=bool)).values()) + self.of_layers
        return late | np.less_equal(self.of_head, at_once)

    @property
    def few_tokens(self) -> Number:
        """Whether the head's gradients of weights are over too soon to hide a gather behind."""
        layout, work = self.layout, self.work
        parts = layout.data.size * layout.fsdp.size * layout.expert.size * layout.context.size
        tokens = work.batch * work.sequence / (parts * layout.microbatches)
        hides = np.greater(layout.gather.size, 1) & np.asarray(layout.weights_overlap)
        return np.less_equal(tokens, FEW_TOKENS) & hides

    def held(self, moment: int, late: Number | None = None) -> dict[str, Number]:
        """Return what is there all through a moment of `MOMENTS`, the head being as `late`."""
        work, layout, passes = self.work, self.layout, self.passes
        gathered = np.greater(layout.gather.size, 1)
        found = {
            "parameters": self.parameters_bytes,
            "optimizer state": self.optimizer_bytes,
            "kept activations": self.activations_bytes,
            "gradients": self.gradients_bytes,
            "images": self.images_bytes,
            "tiles that are not full": self.unfilled_bytes,
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
        if moment == 1 and passes.tables_together:
            found["gradient of the table, beside it"] = self.both_tables * self.table
        if moment == 1 and GATHERED in found:  # the head's is among what it gathers
            found[GATHERED] = np.maximum(found[GATHERED] - self.table, 0.0)
        if np.any(self.cast_bytes):
            found["weights cast ahead"] = (self.elements - self.away) * self.cast_bytes
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
        if late is not None and passes.pooled_waits and not work.model.vocab:
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
        stream and its keys, which its gradients of weights read, and where nothing but weights is
        gathered all of these gradients but the largest."""
        ends = self.ends(mode)
        read = [array for array in ends.late if array.name == "final, for the head"]
        left = 2.0 * self.measure.total(read)
        whole = [self.measure(array.size) for array in ends.whole]
        if not whole or not (mode.prefetch and mode.quiet) or mode.ring:
            return left
        apart = np.less_equal(self.layout.data.size, 1) & np.logical_not(self.layout.partitioned)
        return left + apart * (sum(whole) - reduce(np.maximum, whole))

    def _handed(self, part: int) -> Number:
        """Return the bytes of what a part hands to others."""
        work = self.work.parts[part]
        steps = derived_blocks(work.model, work.attention, self.kinds[part]).ends.steps
        arrays = [step.op.out for step in steps if step.op.out.handed]
        return sum(self.measures[part](stored(array)) for array in arrays)

    def listed(self, moment: int, peak_bytes: float) -> list[Held]:
        """Return all that a single plan's HBM holds at its fullest at a moment of `MOMENTS`; what
        the compiler does without when memory is scarce is taken off in the end."""
        (mode,) = self.modes
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
    flags = np.asarray(flag)
    if flags.all():
        return value(True)
    if not flags.any():
        return value(False)
    return np.where(flags, value(True), value(False))
