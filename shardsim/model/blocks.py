"""A model as a graph: its blocks as short lists of ops, and what stands before and after them.

A new kind of block is a new list; what it splits, moves, computes and keeps follows from it. HBM
passes and vector operations are counted by hand where the ops are made: an exponential or a tanh is
about ten multiply-adds, a norm reads its row twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardsim.graph.arrays import (
    Array,
    Dims,
    Kernel,
    Matmul,
    Op,
    Stream,
    einsum,
    linear,
    pointwise,
    weight,
)

if TYPE_CHECKING:
    from shardsim.model.spec import Model

TOKENS: Dims = ("batch", "seq")
# What each projection out of the stream makes.
_MADE = {"query": "q", "key": "k", "value": "v", "mlp_in": "up", "mlp_gate": "gate"}

HEADS: Dims = ("kv", "group", "head_dim")
KV: Dims = ("kv", "head_dim")

# A norm reads its row and writes it; its gradient reads both, and the gradient of the stream.
NORM = Stream(passes=2.0, ops=8.0, gradient_passes=4.0, gradient_ops=8.0)
# Queries and keys on their way to attention, by head.
TURN = Stream(passes=2.0, ops=8.0, gradient_passes=3.0, gradient_ops=8.0)
# The addition reads the stream and the branch; its result was counted by the matmul.
ADD = Stream(passes=2.0, ops=1.0)
# In the end of the matmul before it; its derivative reads what the activation read.
ACTIVATE = Stream(fused=12.0, fused_gradient=12.0, fused_reads=1.0)
# The product with the gate reads the other projection.
GATE = replace(ACTIVATE, passes=1.0, ops=1.0, gradient_passes=3.0, gradient_ops=4.0)
# Softmax: mask, maximum, difference, exponential (about eight multiply-adds), sum, cast. Its
# gradient: the exponential again, a product and a difference. With the scores in HBM it reads them
# for the maximum and again for the exponential and its sum, and writes the probabilities; backward
# reads probabilities and their gradient twice and writes once.
SOFTMAX = Stream(passes=3.0, ops=13.0, gradient_passes=5.0, gradient_ops=14.0)
LOOK_UP = Stream(passes=2.0, ops=1.0, gradient_passes=3.0, gradient_ops=1.0)
# The loss reads float32 logits for the maximum and for the sum; backward reads them again and
# writes their gradient in the compute format: 14 bytes an element, 3.5 of four.
LOSS = Stream(passes=2.0, ops=15.0, gradient_passes=1.5, gradient_ops=15.0)


@dataclass(frozen=True)
class Stack:
    """Equal blocks, one after another; `ops` go from the array `x` to the last op's result."""

    name: str
    ops: tuple[Op, ...]
    layers: int


@dataclass(frozen=True)
class Graph:
    """A model: stacks of blocks, the ops before them and those after."""

    before: tuple[Op, ...]
    stacks: tuple[Stack, ...]
    after: tuple[Op, ...]

    @property
    def ends(self) -> tuple[Op, ...]:
        """The ops around the blocks; the head reads the array that the embedding writes."""
        return self.before + self.after


def graph_of(model: Model, attention: str = "flash") -> Graph:
    """Return a model's graph; `attention` is "flash" (one fused kernel) or "unfused"."""
    stack = Stack("layers", Block(model, attention).transformer(), model.layers)
    start, end = Ends(model), Ends(model)
    end.head(start.embedding())
    return Graph(before=tuple(start.made), stacks=(stack,), after=tuple(end.made))


class Builder:
    """Makes lists of ops."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.made: list[Op] = []

    def add(self, op: Op) -> Array:
        """Add an op; return what it makes."""
        self.made.append(op)
        return op.out

    def x(self, name: str, keep: str = "rest", purpose: str = "block") -> Array:
        """Return an array of the residual stream."""
        return Array(name, (*TOKENS, "embed"), stream=True, keep=keep, purpose=purpose)

    def norm(self, name: str, source: Array, out: Array, *, layer: bool, bias: bool) -> Array:
        """Add a norm: a layer norm sums two statistics over embed in float32, an RMS norm one."""
        dims = tuple(d for d in source.dims if d != "embed")
        count = ("moments",) if layer else ()
        purpose = "norm statistics" if source.stream else source.purpose
        sums = replace(
            source,
            name=f"{out.name} sums",
            dims=(*dims, *count),
            keep="rest",
            wide=True,
            purpose=purpose,
        )
        self.add(pointwise([source], sums))
        vectors = [weight(f"{name}_scale", "norm", kind="vector")]
        stream = NORM
        if bias:
            vectors.append(weight(f"{name}_bias", "norm", kind="vector"))
            stream = replace(stream, gradient_passes=stream.gradient_passes + 1.0)
        return self.add(pointwise([source, sums], out, *vectors, stream=stream))

    def vectors(self, wanted: bool, name: str, *dims: str) -> tuple[Array, ...]:
        """Return a bias, if it is wanted."""
        return (weight(name, *dims, kind="vector"),) if wanted else ()


class Block(Builder):
    """The blocks of a Transformer."""

    def __init__(self, model: Model, attention: str) -> None:
        super().__init__(model)
        self.kernel = attention == "flash"

    def transformer(self) -> tuple[Op, ...]:
        """Return a block: attention and MLP, one after the other or side by side on one norm."""
        model, x = self.model, self.x("x")
        if model.parallel_block:
            normed = self.block_norm("block_norm", x)
            names = ("attention", "mlp") if model.post_norms else ("y", "y")
            outs = [
                self.x(name, f"{keep}_output")
                for name, keep in zip(names, ("attention", "mlp"), strict=True)
            ]
            if not model.post_norms:
                outs = [outs[0], outs[0]]
            self.attention(normed, outs[0])
            first = len(self.made)
            self.mlp(normed, outs[1])
            if model.post_norms:
                self.made[:first] = [replace(op, call="attention") for op in self.made[:first]]
                self.made[first:] = [replace(op, call="mlp") for op in self.made[first:]]
                outs = [self.block_norm(f"post_{out.name}_norm", out) for out in outs]
            results = list({out.name: out for out in outs}.values())
            self.add(linear([x, *results], self.x("result"), stream=ADD))
            return tuple(self.made)
        for name in ("attention", "mlp"):
            normed = self.block_norm(f"{name}_norm", x)
            out = self.x(name, f"{name}_output")
            if name == "attention":
                self.attention(normed, out)
            else:
                self.mlp(normed, out)
            if model.post_norms:
                out = self.block_norm(f"post_{name}_norm", out)
            x = self.add(linear([x, out], self.x(f"x after {name}", keep=""), stream=ADD))
        return tuple(self.made)

    def block_norm(self, name: str, source: Array) -> Array:
        """Add a norm of the residual stream."""
        layer = self.model.norm == "layernorm"
        made = f"{name} result" if name.startswith("post") else name.replace("_norm", " input")
        return self.norm(name, source, self.x(made), layer=layer, bias=self.model.biases.norm)

    def wide(self, name: str, source: Array, dims: Dims, keep: str, *bias: Array) -> Array:
        """Add a projection out of the residual stream."""
        out = Array(_MADE[name], (*TOKENS, *dims), keep=keep, purpose="second axis")
        return self.add(einsum(source, weight(name, "embed", *dims), out, *bias))

    def attention(self, normed: Array, out: Array) -> None:
        """Add attention: q, k, v, softmax(QK^T)V and its output projection."""
        biases = self.model.biases
        parts = {}
        for name, dims in (("query", HEADS), ("key", KV), ("value", KV)):
            bias = self.vectors(biases.qkv, f"{name}_bias", *dims)
            part = self.wide(name, normed, dims, "qkv", *bias)
            if name != "value":
                part = self.turned(name, part)
            parts[name] = part if name == "query" else part.view(seq="keys")
        q, k, v = parts["query"], parts["key"], parts["value"]
        context = Array("context", q.dims, keep="context", purpose="second axis")
        if self.kernel:
            self.add(flash(q, k, v, context))
        else:
            pairs = (*TOKENS, "keys", "kv", "group")
            scores = self.add(einsum(q, k, Array("scores", pairs), unit="attention"))
            chances = Array("probabilities", pairs)
            self.add(Op((scores,), chances, (chances,), unit="attention", stream=SOFTMAX))
            self.add(einsum(chances, v, context, unit="attention"))
        bias = self.vectors(biases.attention_output, "attention_output_bias", "embed")
        self.add(einsum(context, weight("attention_output", *HEADS, "embed"), out, *bias))

    def turned(self, name: str, part: Array) -> Array:
        """Add what queries or keys go through: their norm by head, and rotation by position."""
        model = self.model
        if model.qk_norm:
            vectors = self.vectors(True, f"{name}_norm_scale", "head_dim")
            vectors += self.vectors(model.biases.norm, f"{name}_norm_bias", "head_dim")
            out = replace(part, name=f"{part.name} normed", keep="rest")
            stream = replace(TURN, by_head=True)
            part = self.add(pointwise([part], out, *vectors, stream=stream))
        if model.positions == "rotary":
            out = replace(part, name=f"{part.name} turned", keep="rest")
            part = self.add(linear([part], out, stream=TURN))
        return part

    def mlp(self, normed: Array, out: Array) -> None:
        """Add an MLP, gated or not."""
        model = self.model
        names = ("mlp_in", "mlp_gate") if model.gated_mlp else ("mlp_in",)
        parts = [
            self.wide(
                name,
                normed,
                ("mlp",),
                "mlp_hidden",
                *self.vectors(model.biases.mlp, f"{name}_bias", "mlp"),
            )
            for name in names
        ]
        stream = GATE if model.gated_mlp else ACTIVATE
        hidden = self.add(
            pointwise(parts, replace(parts[0], name="hidden", keep="rest"), stream=stream)
        )
        bias = self.vectors(model.biases.mlp, "mlp_out_bias", "embed")
        self.add(einsum(hidden, weight("mlp_out", "mlp", "embed"), out, *bias))


def flash(q: Array, k: Array, v: Array, out: Array) -> Op:
    """Return a fused attention kernel: it computes its scores again in the backward pass."""
    batch = tuple(d for d in q.dims if d not in ("seq", "head_dim"))
    kernel = Kernel(
        shape=Matmul(rows=("seq",), inner=("head_dim",), columns=("keys",), batch=batch),
        products=2,
        gradient_products=5,  # the scores again, and dV, dP, dQ, dK
        ops=SOFTMAX.ops,
        gradient_ops=SOFTMAX.gradient_ops,
    )
    return Op((q, k, v), out, (q, k, v, out), unit="attention", kernel=kernel)


class Ends(Builder):
    """What stands before and after the blocks."""

    def embedding(self) -> Array:
        """Add what makes the residual stream."""
        return self.embed_tokens() if self.model.vocab else self.embed_patches()

    def head(self, x: Array) -> None:
        """Add final norm, head and loss."""
        model = self.model
        if model.final_norm:
            out = self.x("final", purpose="vocabulary" if model.vocab else "pooling")
            x = self.norm(
                "final_norm", x, out, layer=model.norm == "layernorm", bias=model.biases.norm
            )
        if model.vocab:
            self.vocabulary_head(x)
        else:
            self.image_head(x)

    def embed_tokens(self) -> Array:
        """Add the look-up of tokens: each member of a tensor axis makes its part of the rows."""
        ids = Array("tokens", (*TOKENS, "vocab"), trained=False)
        table = weight("token_embedding", "vocab", "embed", kind="table", purpose="tables")
        out = self.x("x", purpose="vocabulary")
        ins = [ids, table]
        if self.model.positions == "learned":
            ins.append(
                weight("position_embedding", "position", "embed", kind="table", purpose="ends")
            )
        return self.add(linear(ins, out, stream=LOOK_UP))

    def embed_patches(self) -> Array:
        """Add the patch embedding and the positions."""
        pixels = Array("pixels", (*TOKENS, "patch"), trained=False)
        table = weight("patch_embedding", "patch", "embed", purpose="ends")
        bias = weight("patch_embedding_bias", "embed", kind="vector")
        x = self.add(einsum(pixels, table, self.x("patches"), bias))
        vectors = self.vectors(self.model.pooling == "cls", "cls_token", "embed")
        if self.model.positions == "learned":
            positions = weight(
                "position_embedding", "position", "embed", kind="table", purpose="ends"
            )
            return self.add(linear([x, positions], self.x("x"), *vectors))
        return self.add(linear([x], self.x("x"), *vectors))

    def vocabulary_head(self, final: Array) -> None:
        """Add logits and loss: the maximum of each row, the sum of its exponentials beside the
        target's logit."""
        tied = self.model.tied_embeddings
        name = "token_embedding" if tied else "output_head"
        dims = ("vocab", "embed") if tied else ("embed", "vocab")
        table = weight(name, *dims, kind="table" if tied else "matrix", purpose="tables")
        logits = Array("logits", (*TOKENS, "vocab"), wide=True, purpose="vocabulary")
        self.add(einsum(final, table, logits))
        statistics = Array("maximum", TOKENS, wide=True, purpose="loss statistics")
        self.add(linear([logits], statistics))
        loss = Array("loss", (*TOKENS, "two"), wide=True, purpose="loss statistics")
        self.add(pointwise([logits], loss, stream=LOSS))

    def image_head(self, final: Array) -> None:
        """Add pooling, classifier or features, and the loss."""
        model = self.model
        features = self.attention_pooling(final) if model.pooling == "map" else self.mean(final)
        if model.classes:
            table = weight("classifier", "embed", "classes", purpose="ends")
            bias = weight("classifier_bias", "classes", kind="vector")
            logits = Array("class logits", ("batch", "classes"), wide=True, purpose="pooling")
            self.add(replace(einsum(features, table, logits, bias), eager=True))
        else:  # the loss is the squared error of the features
            errors = Array("errors", ("batch",), wide=True, purpose="pooling")
            self.add(pointwise([features], errors))

    def row(self, name: str) -> Array:
        """Return one vector an image."""
        return Array(name, ("batch", "embed"), purpose="pooling")

    def mean(self, final: Array) -> Array:
        """Add the mean over tokens, or the class token: float32 sums."""
        pieces = Array(
            "pooled pieces", ("batch", "embed"), stream=True, wide=True, purpose="pooling"
        )
        self.add(replace(linear([final], pieces), eager=True))
        return self.add(
            replace(linear([pieces], replace(self.row("pooled"), wide=True)), eager=True)
        )

    def project(self, name: str, source: Array, dims: Dims, out: Array) -> Array:
        """Add a projection of the pooling head, with its bias."""
        into = "embed" in out.dims
        full = (*dims, "embed") if into else ("embed", *dims)
        bias = weight(f"{name}_bias", *(("embed",) if into else dims), kind="vector")
        return self.add(einsum(source, weight(name, *full, purpose="ends"), out, bias))

    def attention_pooling(self, final: Array) -> Array:
        """Add attention of a learned probe to the tokens, then an MLP; every head has its own key
        and value. Source: big_vision, models/vit.py, class MAPHead."""
        heads = ("heads", "head_dim")

        def inner(name: str, lead: Dims, dims: Dims) -> Array:
            return Array(name, (*lead, *dims), purpose="pooling")

        rows: Dims = ("batch",)
        probe = weight("pooling_probe", "embed", kind="vector")
        row = self.add(Op((), self.row("probe rows"), vectors=(probe,)))
        q = self.project("pooling_query", row, heads, inner("pooling q", rows, heads))
        self.made[-1] = replace(self.made[-1], call="pooling_query")
        k = self.project("pooling_key", final, heads, inner("pooling k", TOKENS, heads))
        v = self.project("pooling_value", final, heads, inner("pooling v", TOKENS, heads))
        context = inner("pooling context", rows, heads)
        shape = Matmul(rows=(), inner=("head_dim",), columns=("seq",), batch=("batch", "heads"))
        kernel = Kernel(
            shape=shape, products=2, gradient_products=4, ops=0.0, gradient_ops=0.0, softmax=False
        )
        # A softmax over split keys: its maximum, then its values and their weights.
        largest = Array("pooling maximum", ("batch", "heads"), wide=True, purpose="pooling")
        self.add(Op((q, k), largest, unit="attention"))
        shares = inner("pooling weights", rows, ("heads",))
        shares = replace(shares, wide=True)
        self.add(Op((q, k), shares, (q, k), eager=True))
        sums = replace(context, name="pooling sums", wide=True)
        self.add(Op((q, k, v), sums, (q, k, v), unit="attention", kernel=kernel, eager=True))
        self.add(linear([sums, shares], context))
        pooled = self.project("pooling_attention_output", context, heads, self.row("pooled"))
        normed = self.norm("pooling_norm", pooled, self.row("pooled normed"), layer=True, bias=True)
        up = self.project("pooling_mlp_in", normed, ("mlp",), inner("pooling up", rows, ("mlp",)))
        hidden = self.add(pointwise([up], replace(up, name="pooling hidden")))
        down = self.project("pooling_mlp_out", hidden, ("mlp",), self.row("pooling down"))
        return self.add(linear([pooled, down], self.row("features")))
