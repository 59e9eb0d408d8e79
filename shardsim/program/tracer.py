"""Follows the ops of a block, and notes what is live at each: forward, again and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from shardsim.graph.arrays import Array, Op, Split
from shardsim.graph.derive import Step, Transfer
from shardsim.program.across import gathers, on_tensor, summed_over_tensor
from shardsim.program.ring_lives import RingLives
from shardsim.program.sized import WIDE, by_place, in_tiles, moved, stored, width_of
from shardsim.program.sizes import BLOCK, role_of
from shardsim.program.trace import POSITIONS, Live, Size, Trace

STILL = ", still"  # what names end with of arrays that are gathered for some readers, and stay


class Tracer(RingLives):
    """Follows the ops of a block."""

    def read(self, array: Array, transfers: Iterable[Transfer], prefix: str = "") -> None:
        """Read an array, whole if it is gathered; what was kept appears when it is first read."""
        name = prefix + (array.original or array).name
        for transfer in transfers:
            if transfer.array == array.name and transfer.gradient == bool(prefix):
                if transfer.passed:
                    self.touch(name, array)
                    self.coming_round(name, array, transfer.axes)
                    return
                if f"{name}, whole" not in self.named:
                    self.touch(name, array)
                    self.firsts[name] = self.now
                elif (self.waits or self.passes.stays) and self.now > self.firsts.get(
                    name, self.now
                ):
                    self.still(name, replace(stored(array.original or array), alone=transfer.axes))
                self.make(f"{name}, whole", moved(transfer))
                copied = self.passes.whole_copies and not prefix and not self.ring
                if copied and role_of(transfer.axes) == "tensor":
                    self.make(f"{name}, laid out", moved(transfer))
                return
        self.touch(name, array)

    def coming_round(self, name: str, array: Array, axes: frozenset[str]) -> None:
        """Note two pieces of what passes round: the one that is read, or made, and the next."""
        size = replace(stored(array.original or array), several=axes)
        self.passing(f"{name}, coming round", size, 2.0)

    def still(self, name: str, size: Size) -> None:
        """Let an array live up to now from where it was first read, if nothing gathers it."""
        one = self.named.get(name + STILL)
        if one is None:
            one = Live(name + STILL, size, self.firsts[name] + 1, self.now)
            self.named[name + STILL] = one
            self.arrays.append(one)
        one.last = self.now

    def is_there(self, one: Live) -> bool:
        """Return whether an array that stays does so under its own name: attention's result, which
        its gradient reads."""
        if not one.name.endswith(STILL):
            return False
        known = self.named.get(self.root(one.name.removesuffix(STILL)))
        return known is not None and known.born <= one.born and known.last >= one.last

    def touch(self, name: str, array: Array) -> None:
        """Let an array live up to now."""
        root = self.root(name)
        for source in self.sources.get(root, ()):
            self.touch(source.name, source)
        if root not in self.sources and not self.lives(name):
            self.make(name, stored(array.original or array))

    def operands(self, arrays: Iterable[Array], transfers: Iterable[Transfer]) -> None:
        """Read weights and activations."""
        transfers = tuple(transfers)
        for array in arrays:
            if not array.weight:
                if array.trained or array.name in self.named:
                    self.read(array, transfers)
                continue
            for transfer in transfers:
                if transfer.array == array.name:
                    name = array.name
                    if self.passes.gathers_again and name in self.whole:
                        name += "" if self.whole[name][1] == self.now else " again"
                    first = self.whole.get(name, (self.now, 0, None))[0]
                    size = in_tiles(array, transfer) if self.passes.tiles else moved(transfer)
                    self.whole[name] = (first, self.now, size)

    def forward(self, step: Step, again: str = "") -> None:
        """Run an op."""
        op, place = step.op, step.place
        self.moment(op.name + again)
        self.operands(op.ins, step.gathers)
        if op.relay and not gathers(step):
            array = op.ins[0]
            moving = frozenset[str]().union(*(move.axes for move in step.gathers))
            if moving:
                arriving = replace(stored(op.out), several=moving)
                self.passing(f"{op.out.name}, arriving", arriving)
            self.same[op.out.name] = self.root((array.original or array).name)
            return
        if op.stream.fused and not op.stream.passes:
            self.sources[op.out.name] = op.ins
            return
        partial = frozenset().union(*(move.axes for move in step.settles))
        if op.product and partial:
            over_tensor = any(on_tensor(move.axes) for move in step.settles)
            if self.ring and over_tensor and op.out.stream:
                self.scatter(op.out.name, op.out, place)
            else:
                size = Size(op.out.dims, by_place(op.out, place), width_of(op.out), partial)
                self.passing(f"{op.out.name}, partial", size)
        if op.product and not op.out.stream:
            self.gather(op.out.name, op.out, place, step.gathers, partial)
        if op.out.name in self.fused:
            self.sources[op.out.name] = tuple(array for array in op.ins if not array.weight)
            return
        self.make(op.out.name, self.made(op))
        if op.product and op.out.wide and self.ring == "embed" and self.passes.ring_apart:
            self.named[op.out.name].born += 1  # the last of its summands becomes it
        if op.kernel and op.kernel.mask:
            rows = Size(op.out.dims[:-1], by_place(op.out, place), WIDE)
            self.named[f"{op.out.name}, statistics"] = self.passing(
                f"{op.out.name}, statistics", rows, self.passes.lanes
            )
        if op.passed:
            self.passing(f"{op.out.name}, sums", self.sums(op.out, place, op.passed))
            self.scores(op, op.out, place)

    def scores(self, op: Op, array: Array, place: Split) -> None:
        """Note a block of scores, or its gradient, of queries and keys that pass round: in float32,
        and rounded for the product that reads it; of a kernel the result of a piece."""
        dims = (*array.dims[:-1], BLOCK, *self.by_blocks(op))
        block = Size(dims, by_place(array, place), WIDE, op.passed)
        self.passing(f"{array.name}, scores", block, 1.5)
        if self.by_blocks(op):
            piece = replace(stored(array), several=op.passed)
            self.passing(f"{array.name}, of a piece", piece)

    def made(self, op: Op) -> Size:
        """Return the size of what an op makes."""
        size, passes = stored(op.out), self.passes
        softmax = op.unit == "attention" and not op.product and not op.kernel
        if softmax and passes.scores_bytes is not None:
            return replace(size, width=passes.scores_bytes)
        if op.product and op.out.wide and passes.narrow_logits:
            return replace(size, width="wire")
        return size

    def backward(self, step: Step) -> None:
        """Run an op's gradient."""
        op = step.op
        d = f"d {op.out.name}"
        self.statistics_read(step)
        self.moment(f"{op.name} gradient")
        if step.gradient_settles and op.out.stream:
            self.named.pop(self.root(f"{d}, partial"), None)
            self.make(d, stored(op.out))
        if self.waits and op.product:
            self.wait(step)
        if self.passes.mlp_waits and not self.ring:
            self.wait_for_attention(step)
        if op.product or op.kernel or op.needs:
            self.read(op.out, step.gradient_gathers, "d ")
        if op.unit == "attention" and not op.kernel:
            self.softmax(op)
        if not (self.signs and op.stream.fused_reads):
            self.operands(op.needs, step.gradient_gathers)
        first = self.now
        wanted = [array for array in op.ins if array.trained and not array.weight]
        apart = op.product and len(wanted) < len(op.ins) and not self.ring
        if apart and self.passes.weights_first:
            self.moment(f"{op.name} gradient, of its operand")
            self.read(op.out, step.gradient_gathers, "d ")
            self.operands([array for array in op.needs if array.weight], step.gradient_gathers)
        for array in wanted:
            if array is not wanted[0] and op.product and {*POSITIONS} <= {*op.out.dims}:
                self.second_operand(step, array)
            self.gradient(array, step)
        if apart and not self.passes.weights_first and self.passes.head_last:
            self.weight_last(step)
        else:
            self.of_weights(step, first)

    def statistics_read(self, step: Step) -> None:
        """Read what a kernel kept of each row, and turn it, before the gradient's kernel runs: that
        reads one number of a row."""
        op = step.op
        statistics = self.named.get(f"{op.out.name}, statistics")
        if statistics is None:
            return
        self.moment(f"{op.name} gradient, of its statistics")
        self.read(op.out, step.gradient_gathers, "d ")
        self.operands(op.needs, step.gradient_gathers)
        statistics.last = self.now
        size = replace(statistics.size, turned="seq")
        self.passing(f"{statistics.name}, turned", size, self.passes.lanes)

    def second_operand(self, step: Step, array: Array) -> None:
        """Begin the gradient of a product's second operand: keys, which are not read for it."""
        self.moment(f"{step.op.name} gradient, of {array.name}")
        self.read(step.op.out, step.gradient_gathers, "d ")
        self.softmax(step.op)
        others = [one for one in step.op.needs if one.name != array.name]
        self.operands(others, step.gradient_gathers)

    def put_together_last(self, steps: Sequence[Step]) -> None:
        """Put together what rings gathered, all at once, when gradients of weights are left alone:
        beside the pieces of each is the whole, and what else those gradients read."""
        self.moment("whole arrays are put together")
        for step in steps:
            if step.op.product and step.trained and any(array.weight for array in step.op.ins):
                self.read(step.op.out, step.gradient_gathers, "d ")
                activations = [array for array in step.op.ins if not array.weight]
                self.operands(activations, step.gradient_gathers)
        for one in [*self.arrays]:
            if one.name.endswith(", whole") and one.last == self.now:
                self.passing(f"{one.name}, in pieces", one.size)

    def operand_first(self, step: Step) -> None:
        """Make the gradient of a product's operand, before what its weight's reads is there."""
        self.moment(f"{step.op.name} gradient, of its operand")
        self.read(step.op.out, step.gradient_gathers, "d ")
        self.operands([one for one in step.op.needs if one.weight], step.gradient_gathers)
        for array in step.op.ins:
            if array.trained and not array.weight:
                self.gradient(array, step)

    def weight_last(self, step: Step) -> None:
        """Make the gradient of a product's weight, after that of its operand."""
        self.moment(f"{step.op.name} gradient, of its weight")
        self.read(step.op.out, step.gradient_gathers, "d ")
        self.operands([one for one in step.op.needs if not one.weight], step.gradient_gathers)
        self.of_weights(step, self.now)

    def of_weights(self, step: Step, first: int) -> None:
        """Note the gradients of a product's weights, whole from `first` on."""
        for array in step.op.ins:
            if array.weight not in ("matrix", "table"):
                continue
            place = step.place
            summed = frozenset(a for a, axis in array.split.items() if place.get(a) != axis)
            wide = self.passes.wide_tables and array.weight == "table"
            size = Size(array.dims, by_place(array, place), WIDE if wide else "reduce", summed)
            self.gradients[array.name] = (first, self.now, size)

    def softmax(self, op: Op) -> None:
        """Let softmax's values stay while queries' and keys' gradients are made of them, or under a
        mask while the gradient of scores is made once."""
        again = f"d {op.out.name}, again"
        if not self.passes.attends_first:
            if not op.product:
                self.passing(again, stored(op.out), self.passes.scores_twice)
        elif not op.product:
            self.softmaxed = {op.ins[0].name: op.out}
        elif op.out.name in self.softmaxed:
            out = self.softmaxed[op.out.name]
            self.touch(out.name, out)
            self.passing(again, stored(op.out), self.passes.scores_twice)

    def wait_for_attention(self, step: Step) -> None:
        """Let what gradients of an MLP's weights multiply wait for those of attention."""
        op = step.op
        if op.product and any(array.weight for array in op.ins):
            waiting = [(f"d {op.out.name}", op.out)]
            if self.passes.hidden_waits:
                waiting += [(array.name, array) for array in op.ins if not array.weight]
            self.hidden += [(name, array) for name, array in waiting if "mlp" in array.dims]
        elif op.unit == "attention" and (self.passes.mlp_waits_for_kernels or not op.kernel):
            for name, array in self.hidden:
                self.touch(name, array)

    def wait(self, step: Step) -> None:
        """Let what gradients of weights multiply wait for the rings of the next products back."""
        op = step.op
        operands = tuple(array.name for array in op.ins if not array.weight)
        rings = len(operands) < len(op.ins)
        if rings and operands != self.rings:
            self.rings, self.earlier, self.current = operands, self.current, []
        for other in self.earlier if rings else (*self.earlier, *self.current):
            self.read(other.op.out, other.gradient_gathers, "d ")
            self.operands(other.op.needs, other.gradient_gathers)
        if rings:
            self.current.append(step)

    def gradient(self, array: Array, step: Step) -> None:
        """Make the gradient of an operand."""
        op, place, whole = step.op, step.place, array.original or array
        target, d = f"d {whole.name}", f"d {op.out.name}"
        fresh = self.root(target) not in self.named
        elementwise = not op.product and not op.kernel and not (op.relay and gathers(step))
        elementwise &= array.original is None  # other dimensions may be other sizes
        biased = op.unit == "attention" and not op.product and not op.kernel
        biased = biased and sum(one.trained and not one.weight for one in op.ins) > 1
        if biased and fresh and array.dims == op.out.dims:  # the bias's is a sum of it, in float32
            self.make(target, replace(stored(whole), width=WIDE))
            return
        if elementwise and fresh and array.dims == op.out.dims and self.root(d) in self.named:
            self.same[target] = self.root(d)
            self.touch(d, op.out)
        elif elementwise and fresh and array.wide and self.root(whole.name) in self.named:
            self.same[target] = self.root(whole.name)  # a loss: in the place of what it reads
        elif op.product and array.stream and summed_over_tensor(array, place):
            if not fresh:  # what this is added to
                self.touch(target, array)
            if self.ring:
                self.scatter(target, whole, place)
                if self.passes.ring_pieces:  # those that add to one sum run side by side
                    for other in self.together.get(target, ()):
                        self.touch(f"d {other.name}", other)
                    self.together.setdefault(target, []).append(op.out)
            else:
                self.make(
                    f"{target}, partial", Size(whole.dims, by_place(whole, place), width_of(whole))
                )
        else:
            apart = op.unit == "attention" and op.product and whole.name in self.turned
            self.make(target, replace(stored(whole), width=WIDE) if apart else stored(whole))
            for transfer in step.gathers:  # whole, of keys of the whole sequence
                if transfer.array == array.name and role_of(transfer.axes) == "context":
                    self.passing(f"{target}, whole", moved(transfer))
            if op.passed and array.original:
                self.coming_round(target, array, op.passed)
            elif op.passed:
                self.passing(f"{target}, sums", self.sums(whole, place, op.passed))
                self.scores(op, whole, place)
            if op.product and not array.stream:
                inner = frozenset(axis for axis, d in place.items() if d not in array.dims)
                if inner:
                    size = Size(whole.dims, by_place(whole, place), width_of(whole), inner)
                    self.passing(f"{target}, partial", size)
                self.gather(target, whole, place, step.gradient_gathers, inner)

    def late(self, steps: Sequence[Step]) -> list[Live]:
        """Return what gradients of weights multiply: operands, and gradients of results.

        Rings that are emitted read the logits' gradient in pieces, in the compute format, as do
        those of the partitioner where it is written (`Passes.logits_apart`); otherwise it is made
        in the matmul that reads it, from the float32 logits (llama3-8b and llama3-70b on tpu7x,
        maxtext-22b left to the partitioner).
        """
        pieces = self.passes.narrow_logits or (bool(self.ring) and self.gradient_written)
        found: dict[str, Live] = {}
        for step in steps:
            activations = [array for array in step.op.ins if not array.weight]
            if not step.op.product or len(activations) != 1:
                continue
            if not any(array.weight and array.trained for array in step.op.ins):
                continue
            array, out = activations[0], step.op.out
            whole = [moved(t) for t in step.gathers if t.array == array.name]
            size = whole[0] if whole else stored(array)
            found[array.name] = Live(f"{array.name}, for the head", size, 0, 0)
            width = "wire" if pieces else width_of(out)
            result = Size(out.dims, by_place(out, step.place), width)
            found[f"d {out.name}"] = Live(f"d {out.name}, for the head", result, 0, 0)
        return list(found.values())

    def trace(self, ahead: int, carried: bool = True) -> Trace:
        """Return all of it: whole weights and gradients take their places, and if they are
        `carried`, round the loop."""
        arrays = [one for one in self.arrays if not self.is_there(one)]
        arriving = [(f"{n}, gathered", *uses) for n, uses in self.whole.items()]
        leaving = [(f"d {n}, whole", *span) for n, span in self.gradients.items()]
        for spans, by in ((arriving, -ahead), (leaving, self.passes.gradients_waiting)):
            times = sorted({first for _, first, _, _ in spans})
            for name, first, last, size in spans:
                rounds, index = divmod(times.index(first) + by, len(times))
                start, stop = (times[index], last) if by <= 0 else (last, times[index])
                if rounds:
                    arrays.append(Live(name, size, start, self.now))
                    if carried:
                        arrays.append(Live(name, size, 0, stop))
                else:
                    arrays.append(Live(name, size, start, stop))
        return Trace(tuple(self.labels), tuple(arrays))
