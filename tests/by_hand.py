"""A step of one device counted by hand, from the model's dimensions alone.

Every operation is written here as the arrays that it reads and writes once what follows it
elementwise is fused into it. Nothing of the package's own counting is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from shardsim.model import Model
from shardsim.plan import Plan
from shardsim.plan.precision import DTYPE_BYTES

FLASH_BLOCK = 512  # queries and keys of one block of the fused kernel

Key = tuple[str, str]  # pass, kind

# Float32 operations per element (per query-key pair, per logit, per weight).
NORM, ACTIVATION, ADD, QUANTISE = 8, 12, 1, 4
SOFTMAX, SOFTMAX_GRADIENT = 13, 14
LOSS, UPDATE = 30, 16
LOSS_IN_A_PASS = 2
# Bytes that an optimizer keeps of a weight.
STATE_BYTES = {"adamw": 8, "momentum": 4, "sgd": 0, "adafactor-full": 4, "adamw-bf16-mu": 6}


@dataclass
class Hand:
    """A step of one device, counted by hand: `t` tokens of a tensor group, `r` a member's own."""

    plan: Plan
    tensor: int = 1
    fsdp: int = 1  # over which weights are stored in parts
    second: int = 1  # over which embed is split, and what is between matmuls once more
    split: bool = True  # the residual stream lies over the tensor axis
    emitted: bool = False  # as the TPU compiler makes the emitted program
    ring: str = ""  # what its rings over the tensor axis cut, if any: "seq" or "embed"
    sums: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    now: str = "forward"
    times: float = 1.0

    def __post_init__(self) -> None:
        model, plan = self.model, self.plan
        groups = plan.machine.devices / self.tensor / self.second
        self.embed = model.embed // self.second
        self.sequences = plan.batch / groups / plan.microbatches
        self.t = self.sequences * plan.sequence
        self.x = self.t * self.embed  # the input of a branch, whole over the tensor axis
        self.r = self.x / (self.tensor if self.split else 1)  # the residual stream
        self.wire = 4 if plan.precision.compute == "f32" else 2
        self.stored = DTYPE_BYTES[plan.precision.parameters]
        self.reduced = DTYPE_BYTES[plan.precision.reduce]
        self.q = model.heads * model.head_dim // self.tensor
        self.k = model.kv_heads * model.head_dim // self.tensor
        self.v = self.k
        self.h = model.mlp // self.tensor
        self.ins = self.h * (2 if model.gated_mlp else 1)
        self.heads = model.heads // self.tensor // self.second
        self.wide = self.t / self.second  # tokens of what lies between the matmuls
        # Members of the second axis that cannot split key-value heads all hold them.
        whole = model.kv_heads // min(self.tensor, model.kv_heads) % self.second
        self.keys = (self.t if whole else self.wide) * self.k
        self.pairs = self.sequences * self.heads * plan.sequence**2
        self.saves = plan.remat.groups[0].save
        on_tokens = self.split and not {"t"} & set(plan.activations.get("embed", ()))
        self.rows = self.t / (self.tensor if on_tokens else 1)  # tokens of the residual stream

    @property
    def model(self) -> Model:
        return self.plan.model

    # Entries. Arrays are given in elements.

    def add(self, kind: str, elements: float, ops: float = 0.0, width: float | None = None) -> None:
        total = self.sums[self.now, kind]
        total[0] += self.times * elements * (self.wire if width is None else width)
        total[1] += self.times * ops

    def stream(self, reads: list[float], writes: list[float], ops: float = 0.0) -> None:
        self.add("elementwise", sum(reads) + sum(writes), ops)

    def product(
        self,
        rows: float,
        deep: float,
        columns: float,
        *,
        out: float | None = None,
        also_reads: float = 0.0,
        ops: float = 0.0,
    ) -> None:
        """Both operands are read once and the result is written, `out` bytes an element."""
        self.add("matmul", rows * deep + deep * columns + also_reads, ops)
        self.add("matmul", rows * columns, 0.0, self.wire if out is None else out)

    # Operations that forward and recomputation share.

    def norms(self, many: int) -> None:
        """Reads the residual stream and writes it normed."""
        for _ in range(many):
            self.stream([self.r], [self.r], NORM * self.r)

    def without_sums(self, elements: float) -> None:
        """A norm that has its sums reads and writes in three fifths of the time of both passes."""
        if "statistics" in self.saves:
            self.add("elementwise", -0.8 * elements)

    def quantised(self, elements: float) -> None:
        """To 8 bits: read for the largest value, read again, written at half the width."""
        if self.plan.precision.compute in ("fp8", "int8"):
            self.stream([elements, elements], [elements / 2], QUANTISE * elements)

    def rotary_and_query_norm(self, passes: int) -> None:
        """Queries and keys in and out; a gradient reads the values and what comes back."""
        model = self.model
        rounds = int(model.qk_norm) + int(model.positions == "rotary")
        elements = self.wide * self.q + self.keys
        self.stream(
            [elements] * (passes - 1) * rounds, [elements] * rounds, NORM * elements * rounds
        )
        if model.qk_norm and passes > 2:  # both once more: for the sums of the gradient
            self.stream([elements] * 2, [], 0)
            if model.biases.norm:  # the gradient of a bias: a sum of its own
                self.stream([elements], [], ADD * elements)
        if not (self.emitted and self.ring and rounds):
            return
        # They come by position and are turned by head: laid out so once, in float32; those that
        # came in rows only for a kernel.
        if self.ring == "embed" or self.plan.attention == "flash":
            self.add("copy", 2 * elements, width=4)
        if model.qk_norm and self.ring == "embed":
            # A norm of its own reads float32 for the mean, the variance and the result, which is
            # bf16; its gradient has seven such arrays and a bf16 one.
            apart = 3 * 4 + 2 if passes == 2 else 7 * 4 + 2
            self.add("elementwise", elements, width=apart - (2 if passes == 2 else 5) * self.wire)

    def laid_out(self, kind: str, elements: float) -> None:
        """What the TPU compiler lays out anew is read and written."""
        if self.emitted:
            self.add(kind, 2 * elements)

    def placed(self, by_head: float, others: float) -> None:
        """What a ring over the sequence makes in pieces, put into its place, which forward is a
        copy of an empty array; what attention has by head is turned then."""
        if self.ring == "seq":
            self.laid_out("elementwise", by_head + others)
            self.laid_out("transpose", by_head)
            if self.now == "forward":
                self.laid_out("copy", by_head + others)

    def gathered_into_place(self, elements: float) -> None:
        """Pieces read and written once more into the whole; those of embed are turned before."""
        self.laid_out("elementwise", elements)
        if self.ring == "embed":
            self.laid_out("transpose", elements)

    def scattered(self, by_head: float = 0.0) -> None:
        """A ring that scatters: it reads rows of what attention made by head, and in the end adds
        up its own product, in float32, and what came from both sides."""
        if self.ring:
            self.laid_out("transpose", by_head)
            self.add("elementwise", self.r, width=4 + 2 + 2)

    def activation_apart(self, passes: int) -> None:
        """A matmul in pieces of the sequence has no activation in its end."""
        if self.emitted and self.ring == "seq":
            self.add("elementwise", passes * self.t * self.h)

    def fraction(self) -> float:
        """Blocks of 512 x 512 on and below the diagonal of a causal mask are computed."""
        sequence = self.plan.sequence
        if not self.model.causal or sequence <= FLASH_BLOCK:
            return 1.0
        blocks = sequence // FLASH_BLOCK
        return sum(range(1, blocks + 1)) / blocks**2

    def fetched_keys(self) -> float:
        """Keys and values once, or in the compiled kernel for each block of queries of each head
        that sees them, but where all of them are one block."""
        blocks = self.plan.sequence // FLASH_BLOCK
        if not self.emitted or blocks < 2:
            return 2 * self.keys
        return 2 * self.wide * self.q * blocks * self.fraction()

    def lanes(self) -> float:
        """A number of each row of each head in 128 lanes."""
        return self.sequences * self.heads * self.plan.sequence * 128.0

    def attend(self, scores: bool, context: bool) -> None:
        """Fused: queries, keys, values in, context out. Else scores, softmax and weighted values
        apart, each of `scores` and `context` only if wanted."""
        if self.plan.attention == "flash":
            if context:
                elements = self.wide * 2 * self.q + self.fetched_keys()
                self.add("attention", elements, SOFTMAX * self.pairs * self.fraction())
                self.add("attention", self.lanes() * self.emitted, width=4.0)
            return
        queries = keys = self.wide * self.q  # every query head reads the keys of its group
        if scores:
            self.add("attention", queries + keys + self.pairs)
            # Read for the maximum, read for exponentials and their sum, written.
            self.add("attention", 3 * self.pairs, SOFTMAX * self.pairs)
        if context:
            self.add("attention", self.pairs + keys + queries)

    # A layer.

    def branches(self) -> list[tuple[bool, bool]]:
        """Return whether attention and whether the MLP is in each branch."""
        return [(True, True)] if self.model.parallel_block else [(True, False), (False, True)]

    def branch_norms(self, attention: bool, mlp: bool) -> int:
        return 1 + (int(attention) + int(mlp) if self.model.post_norms else 0)

    def into(self, attention: bool, mlp: bool) -> list[tuple[float, bool]]:
        """Return (width, activation fused in) of the input projections: products of their own."""
        gates = 2 if self.model.gated_mlp else 1
        if attention and mlp and self.plan.fused_projections:
            return [(self.q + self.k + self.v + self.ins, True)]
        heads = [(self.q, False), (self.k, False), (self.v, False)]
        return heads * attention + [(self.h, at == 0) for at in range(gates)] * mlp

    def out_of(self, attention: bool, mlp: bool) -> list[tuple[float, bool]]:
        """Return the same of the output projections, whose gradient has the activation's in it."""
        if attention and mlp and self.plan.fused_projections:
            return [(self.q + self.h, True)]
        return [(self.q, False)] * attention + [(self.h, True)] * mlp

    def forward(self) -> None:
        model, t = self.model, self.t
        self.cast_weights()
        for attention, mlp in self.branches():
            ins, outs = self.into(attention, mlp), self.out_of(attention, mlp)
            self.norms(self.branch_norms(attention, mlp))
            self.quantised(self.x)
            for width, acts in ins:
                self.product(t, self.embed, width, ops=ACTIVATION * self.wide * self.h * acts)
            self.placed(t * (self.q + self.k + self.v) * attention, t * self.ins * mlp)
            if mlp:
                self.activation_apart(2)
            if attention:
                self.rotary_and_query_norm(2)
                self.attend(True, True)
            if mlp and model.gated_mlp:
                # The product of both projections is made as the output projection reads one of
                # them: the other is read besides.
                hidden = self.wide * self.h
                self.stream([hidden], [], ADD * hidden)
            self.quantised(t * sum(out for out, _ in outs))
            for out, _ in outs:
                self.product(t, out, self.embed)
            self.scattered(t * self.q * attention)
            # Residual and branch are read; the sum takes the place of the product's result.
            self.stream([self.r, self.r], [], ADD * self.r)
        kept = self.kept()
        self.laid_out("transpose", kept)  # zeros of the stacks, as slowly
        copied = self.r if self.emitted else kept  # the rest is written there as it is made
        self.stream([copied], [copied])

    def kept(self) -> float:
        """Return the elements of a layer that are copied to where the backward pass finds them."""
        model, t, saves = self.model, self.wide, self.saves
        # Where rotated queries and keys are kept, no gradient reads them as they were before.
        turned = "rest" in saves and model.positions == "rotary" and not model.qk_norm
        heads = t * self.q + 2 * self.keys
        heads_of_norms = (t * self.q + self.keys) / model.head_dim
        arrays = {
            "qkv": self.keys if turned else heads,
            "context": t * self.q,
            "mlp_hidden": t * self.ins,
            # In a parallel block one sum ends both branches: no backward pass reads its parts.
            "attention_output": 0.0 if model.parallel_block and not model.post_norms else self.r,
            "mlp_output": self.r if model.post_norms else 0.0,
            "statistics": (  # in float32: a layer norm's are two, of each row or head
                (
                    self.rows * sum(self.branch_norms(*branch) for branch in self.branches())
                    + heads_of_norms * model.qk_norm
                )
                * (2 if model.norm == "layernorm" else 1)
                * (4 / self.wire)
            ),
            "rest": (
                self.r * len(self.branches())  # normed inputs
                # What is added between two branches, after a norm.
                + self.r * (model.post_norms and not model.parallel_block)
                + t * self.h  # the activated hidden layer
                + (t * self.q + self.keys) * (model.qk_norm or model.positions == "rotary")
                + (self.pairs if self.plan.attention == "unfused" else 0.0)  # probabilities
            ),
        }
        return self.r + sum(elements for name, elements in arrays.items() if name in saves)

    def layer_weights(self) -> float:
        """Return the elements of a layer's matrices that one device computes with."""
        return self.embed * (2 * self.q + self.k + self.v + self.ins + self.h)

    def cast_weights(self) -> None:
        """What is stored in another format is read in it and written in the one on the wire."""
        if self.stored != self.wire:
            own = self.layer_weights() / self.fsdp
            self.add("elementwise", own, width=self.stored)
            self.add("elementwise", own)
        if self.fsdp > 1:
            # Pieces of whole tiles come as matmuls read them, but for those of heads.
            heads = 0 if self.ring else self.embed * (2 * self.q + self.k + self.v)
            odd = self.embed // self.fsdp % 8 != 0
            self.laid_out("copy", self.layer_weights() if odd else heads)

    def recompute(self, attention: bool, mlp: bool) -> None:
        """What the backward pass reads and the forward pass did not keep."""
        model, t, saves = self.model, self.t, self.saves
        everything = "rest" in saves
        if not everything:
            # Of norms after a branch only what is added between two branches is needed again.
            many = 2 if model.post_norms and attention and not mlp else 1
            self.norms(many)
            self.without_sums(self.r * many)
        if self.ring:
            self.gathered_into_place(self.x)
        if (attention and "qkv" not in saves) or (mlp and "mlp_hidden" not in saves):
            self.quantised(self.x)
        if attention:
            if "qkv" not in saves:
                for width in (self.q, self.k, self.v):
                    self.product(t, self.embed, width)
                self.placed(t * (self.q + self.k + self.v), 0)
            if not everything:
                self.rotary_and_query_norm(2)
                self.without_sums((self.wide * self.q + self.keys) * model.qk_norm)
            self.attend(not everything, "context" not in saves)
        if mlp and "mlp_hidden" not in saves:
            for width, acts in self.into(False, True):
                self.product(t, self.embed, width, ops=ACTIVATION * self.wide * self.h * acts)
            self.placed(0, t * self.ins)  # what reads it applies the activation
        if mlp and model.gated_mlp and not everything:
            # The weight gradient reads the product with the gate: made again from both.
            hidden = self.wide * self.h
            self.stream([hidden], [], ADD * hidden)
        if attention and not mlp:
            # What a serial block adds between its branches is not kept.
            self.stream([self.r, self.r], [], ADD * self.r)
        # The residual between two branches, or the input of a norm after the branch.
        if attention and (not mlp or model.post_norms) and "attention_output" not in saves:
            self.quantised(t * self.q)
            self.product(t, self.q, self.embed)
            self.scattered(t * self.q)
        if mlp and model.post_norms and "mlp_output" not in saves:
            self.quantised(t * self.h)
            self.product(t, self.h, self.embed)
            self.scattered()

    def backward(self) -> None:
        model, t = self.model, self.t
        self.cast_weights()
        for attention, mlp in reversed(self.branches()):
            ins, outs = self.into(attention, mlp), self.out_of(attention, mlp)
            self.recompute(attention, mlp)
            self.quantised(self.x)
            for out, acts in outs:
                hidden = self.wide * self.h * acts  # the activation's input, for its derivative
                self.product(t, self.embed, out, also_reads=hidden, ops=ACTIVATION * hidden)
                self.product(out, t, self.embed, out=self.reduced)
            self.placed(t * self.q * attention, t * self.h * mlp)
            if self.ring:
                self.gathered_into_place(self.x)
                self.laid_out("transpose", t * self.q * attention)  # for the weight's gradient
            if mlp:
                self.activation_apart(3)
            if mlp and model.gated_mlp:
                # Two products: the gradient and a factor in, the other factor's gradient out.
                hidden = self.wide * self.h
                self.stream([hidden, hidden], [hidden], 4 * ADD * hidden)
            if attention:
                self.attend_backward()
                self.rotary_and_query_norm(3)
            self.quantised(t * sum(width for width, _ in ins))
            for width, _ in ins:
                self.product(t, width, self.embed)
                self.product(self.embed, t, width, out=self.reduced)
            self.scattered(t * (self.q + self.k + self.v) * attention)
            self.biases(attention, mlp)
            many = self.branch_norms(attention, mlp)
            # A norm's input, its gradient and the residual's gradient in, their sum out.
            self.stream([self.r] * 3 * many, [self.r] * many, NORM * self.r * many)
        # Gradients as they were reduced in; gradients as they are stored out, and in before that
        # if they add to those of other microbatches.
        if self.fsdp > 1 and not self.ring:
            self.laid_out("copy", self.embed * (self.q + self.k + self.v))
        own = self.layer_weights() / self.fsdp
        self.add("elementwise", own, width=self.reduced)
        self.add("elementwise", own, width=self.stored * (2 if self.plan.microbatches > 1 else 1))

    def attend_backward(self) -> None:
        """Queries, keys, values, context and its gradient in; gradients of the first three out."""
        if self.plan.attention == "flash":
            elements = self.wide * 4 * self.q + 2 * 2 * self.keys
            # The compiled kernels are two, for keys with values and for queries, each with a
            # softmax of its own; one where a block is all.
            kernels = 2 if self.emitted and self.plan.sequence > FLASH_BLOCK else 1
            ops = kernels * SOFTMAX_GRADIENT * self.pairs * self.fraction()
            if self.emitted:  # read for keys and values, written; read for queries, written
                side = self.wide * self.q
                times = max(self.plan.sequence // FLASH_BLOCK * self.fraction(), 1)
                elements = 2 * side * times + 4 * self.keys
                elements += side + (2 * side + self.fetched_keys()) * (kernels == 2)
                self.add("elementwise", 2 * side)
                self.add("elementwise", self.lanes(), width=4.0)
            self.add("attention", elements, ops)
            return
        side = self.wide * self.q
        for _ in ("values", "probabilities", "queries", "keys"):
            self.add("attention", self.pairs + side + side)
        # Probabilities and their gradients twice (for the row's sum, for the difference), written.
        self.add("attention", 5 * self.pairs, SOFTMAX_GRADIENT * self.pairs)

    def biases(self, attention: bool, mlp: bool) -> None:
        """A bias gradient is a sum over tokens: it reads its array once."""
        biases, t = self.model.biases, self.t
        wide = [t * (self.q + self.k + self.v)] if biases.qkv and attention else []
        if not (self.emitted and self.ring == "seq"):  # others read them there
            wide += [self.x] if biases.attention_output and attention else []
            wide += [t * self.ins, self.x] if biases.mlp and mlp else []
        for elements in wide:
            self.stream([elements], [], ADD * elements)
        if biases.norm:  # beside the sum for the scale
            self.stream([], [], ADD * self.r * self.branch_norms(attention, mlp))

    # Before and after the layers.

    def ends(self) -> None:
        model = self.model
        if model.patch:
            # Patches are embedded by each member for its own part; pixels have no gradient.
            pixels, rows = model.patch**2 * model.channels, self.rows
            columns = self.r / rows
            self.quantised(rows * pixels)
            self.quantised(self.r)
            self.product(rows, pixels, columns)
            self.product(pixels, rows, columns, out=self.reduced)
            self.stream([self.r], [], ADD * self.r)  # the gradient of its bias
        if model.final_norm:
            self.stream([], [], ADD * self.r * model.biases.norm)
            self.stream([self.r] * 4, [self.r] * 2, 2 * NORM * self.r)
        if model.vocab:
            self.vocabulary()
        elif model.pooling == "map":
            self.pooling()
        if model.classes:
            # One vector an image: float32 logits, and two gradients of them.
            images, classes = self.sequences, model.classes
            self.product(images, self.embed, classes, out=4)
            self.product(images, classes, self.embed)
            self.product(self.embed, images, classes, out=self.reduced)
            self.add("elementwise", images * classes, ADD * images * classes, width=4)  # its bias

    def pooling(self) -> None:
        """One query an image against all tokens; then an MLP on one vector an image."""
        model, images = self.model, self.sequences
        width = model.heads * model.head_dim // self.tensor
        products = [
            (images, self.embed, width),  # query
            (self.t, self.embed, width),  # keys
            (self.t, self.embed, width),  # values
            (images, width, self.embed),
            (images, self.embed, self.h),
            (images, self.h, self.embed),
        ]
        for rows, deep, columns in products:
            self.product(rows, deep, columns)
            self.product(rows, columns, deep)  # gradient of the input
            self.product(deep, rows, columns, out=self.reduced)  # gradient of the weight
            # The gradient of the bias: over all that the second axis has gathered.
            self.stream([rows * columns], [], ADD * rows * columns)
        vectors = images * self.embed
        self.stream([vectors] * 4, [vectors] * 2, (2 * NORM + ADD) * vectors)  # a norm of them
        # Scores and weighted values, and two gradients of each: every one crosses all keys or
        # all values of the member's heads.
        for _ in range(2 + 4):
            self.add("attention", self.wide * width)
        # The query and the result, forward and twice backward.
        self.add("attention", 3 * 2 * images * width / self.second)

    def vocabulary(self) -> None:
        model, t = self.model, self.t
        vocab = model.vocab / self.tensor
        self.stream([self.x], [self.x], ADD * self.x)  # rows of the table, for all of the group
        self.quantised(self.x)
        self.product(t, self.embed, vocab, out=4)  # float32 logits
        logits = t * vocab
        self.quantised(logits)  # their gradient
        # Float32 for the maximum, the sum and the gradient; the gradient as it is multiplied.
        if not self.ring:  # the rest is in the ends of products, and in operands
            self.add("elementwise", logits, LOSS_IN_A_PASS * logits, width=4)
        else:
            self.add("elementwise", logits, LOSS * logits, width=4 + 4 + 4 + 2)
        self.product(t, vocab, self.embed)
        self.scattered()
        self.product(self.embed, t, vocab, out=self.reduced)
        # Rows of the table's gradient: read, added to, written, for all tokens of the group.
        self.stream([self.x, self.x], [self.x], ADD * self.x)

    def update(self) -> None:
        """Weights and gradients in, weights out; the optimizer's state in and out."""
        model = self.model
        own = 0.0
        for tensor in model.tensors:
            by = self.tensor if {"heads", "kv_heads", "mlp", "vocab"} & set(tensor.axes) else 1
            if tensor.kind != "vector" and "embed" in tensor.axes:
                by *= self.fsdp * self.second
            own += tensor.size / by
        self.add("optimizer", own, UPDATE * own, width=3 * self.stored)
        self.add("optimizer", own, width=2 * STATE_BYTES[self.plan.optimizer])

    def step(self) -> dict[Key, tuple[float, float]]:
        """Return what `planned` returns."""
        passes: list[tuple[str, float, Callable[[], None]]] = [
            ("head", self.plan.microbatches, self.ends),
            ("forward", self.plan.microbatches * self.model.layers, self.forward),
            ("backward", self.plan.microbatches * self.model.layers, self.backward),
            ("update", 1, self.update),
        ]
        for self.now, self.times, count in passes:
            count()
        return {key: (total[0], total[1]) for key, total in self.sums.items() if any(total)}
