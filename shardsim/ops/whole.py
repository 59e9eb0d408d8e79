"""What the model does with arrays, on a device that holds them whole.

`Whole` is the model without any sharding: the one-device run and the yardstick of the others.
`Explicit` and `Partitioned` override what sharding changes, and nothing else. The residual
stream is x [batch, tokens, embed]; between the projections of a block arrays are "wide":
[batch, tokens, mlp], [batch, tokens, heads, head_dim] or the last two joined.
"""

from __future__ import annotations

from typing import Any

from shardsim.ops.attend_kernels import flash_attention
from shardsim.ops.lazy import jax, jnp, lax

Array = Any
Params = dict[str, Any]


def dtype(name: str) -> Any:
    """Return the format that a plan calls "f32" or "bf16"."""
    return {"f32": jnp.float32, "bf16": jnp.bfloat16}[name]


def stored_gradient(x: Any) -> Any:
    """Return x, whose gradient is written once.

    Fused into the operand of the matmuls that read it, the TPU compiler would compute it again for
    every tile of each of them.
    """
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, None), lambda _, gradient: (lax.optimization_barrier(gradient),))
    return identity(x)


def as_written(x: Any) -> Any:
    """Return x, which is written as it is, and so is its gradient."""
    identity = jax.custom_vjp(lax.optimization_barrier)
    identity.defvjp(
        lambda x: (lax.optimization_barrier(x), None),
        lambda _, gradient: (lax.optimization_barrier(gradient),),
    )
    return identity(x)


def linear(x: Array, w: Array, kind: Any = None) -> Array:
    """Return x [batch, tokens, embed] @ w [embed, ...]; heads stay apart where w has them apart."""
    return jnp.einsum("bsk,k...->bs...", x, w, preferred_element_type=kind)


def logits_linear(x: Array, w: Array, platform: str) -> Array:
    """Return x [batch, tokens, embed] @ w [embed, vocab] in float32.

    On GPU its gradient is taken in the format of x: float32 operands would run as TF32, at half of
    the rate. TPUs take them as bf16 by themselves.
    """
    if platform != "gpu":
        return linear(x, w, jnp.float32)

    def products(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        x, w = kept
        gradient = gradient.astype(x.dtype)
        return (
            jnp.einsum("bsn,kn->bsk", gradient, w),
            jnp.einsum("bsk,bsn->kn", x, gradient),
        )

    product = jax.custom_vjp(lambda x, w: linear(x, w, jnp.float32))
    product.defvjp(lambda x, w: (linear(x, w, jnp.float32), (x, w)), products)
    return product(x, w)


def linear_out(h: Array, w: Array) -> Array:
    """Return h [batch, tokens, mlp] or [batch, tokens, heads, head_dim] @ w [wide, embed]."""
    if h.ndim == 3:
        return jnp.einsum("bsk,kn->bsn", h, w)
    return jnp.einsum("bshd,hdn->bsn", h, w.reshape(*h.shape[2:], -1))


def joined(h: Array) -> Array:
    """Return a wide array with heads and head_dim as one dimension."""
    return h.reshape(*h.shape[:2], -1)


def columns(x: Array, w: Array) -> Array:
    """Return x [batch, tokens, embed] @ w [embed, heads, head_dim] as one product over columns,
    whose result is laid out by head afterwards.

    Left to itself the TPU compiler makes some products of heads one by one, gradients too: heads
    narrower than the matrix unit then fill a part of it.
    """
    y = as_written(linear(x, w.reshape(len(w), -1)))
    return as_written(y.reshape(*y.shape[:2], *w.shape[1:]))


def columns_out(h: Array, w: Array) -> Array:
    """Return h [batch, tokens, heads, head_dim] @ w [wide, embed] as one product (`columns`)."""
    return linear_out(as_written(joined(as_written(h))), w)


class Whole:
    """The operations of the model where nothing is sharded."""

    copies = 1  # devices that compute one and the same loss
    token_copies = 1  # devices that compute the same of a token
    # Of rows that hold several sequences or padding: which one a token is of [batch, tokens], 0 for
    # none, and what its loss counts.
    segments: Array | None = None
    counts: Array | None = None

    def __init__(
        self, plan: Params, model: Params, parameters: Params, activations: Params
    ) -> None:
        self.plan = plan
        self.model = model
        self.parameters = parameters
        self.activations = activations
        self.compute = dtype(plan["compute"])

    def flat(self) -> Whole:
        """Return the way to work on one vector an image (after pooling) instead of tokens."""
        return self

    def part(self, part: Params) -> Whole:
        """Return the way of a stack that the model reads."""
        name = f"{part['name']}/"
        own = {
            key.removeprefix(name): entry
            for key, entry in self.parameters.items()
            if key.startswith(name)
        }
        remat = [{**group, "layers": part["model"]["layers"]} for group in self.plan["remat"]]
        plan = {**self.plan, "sequence": part["sequence"], "remat": remat}
        return self.of(plan, part["model"], own)

    def of(self, plan: Params, model: Params, parameters: Params) -> Whole:
        """Return the same way of another plan and model."""
        return type(self)(plan, model, parameters, self.activations)

    # Parameters.

    def in_layer_order(self, stack: Array) -> Array:
        """Return a stack of layers in their order: where they are dealt round stages, those of a
        stage lie together."""
        stages, chunks = self.plan["stages"], self.plan["chunks"]
        if chunks == 1:
            return stack
        return (
            stack.reshape(stages, chunks, -1, *stack.shape[1:]).swapaxes(0, 1).reshape(stack.shape)
        )

    def of_layer(self, weights: Params) -> Params:
        """Return the weights of a layer as its calls read them."""
        return weights

    def weight(self, params: Params, name: str) -> Array:
        """Return a weight in the compute format, heads and head_dim apart."""
        return params[name].astype(self.compute)

    def matrix(self, params: Params, name: str) -> Array:
        """Return a weight in the compute format as [input, output]."""
        return self.flatten(self.weight(params, name), name)

    def flatten(self, value: Array, name: str) -> Array:
        """Join heads and head_dim, on whichever side of the matrix they are."""
        axes = self.parameters[name]["axes"]
        if len(axes) == 2:
            return value
        if axes[0] in ("embed", "rank"):
            return value.reshape(value.shape[0], -1)
        return value.reshape(-1, value.shape[-1])

    def vector(self, params: Params, name: str) -> Array:
        """Return a vector along the residual stream's embed, in float32."""
        return self.own_embed(params[name].astype(jnp.float32))

    def wide_vector(self, params: Params, name: str) -> Array:
        """Return a bias of a wide array, in the compute format."""
        return params[name].reshape(-1).astype(self.compute)

    def with_bias(self, y: Array, params: Params, name: str) -> Array:
        """Return a wide array with its bias added."""
        return y + self.wide_vector(params, name).reshape(y.shape[2:])

    def end_matrix(self, params: Params, name: str) -> Array:
        """Return a matrix or table [rows, embed] that adds to the residual stream."""
        return self.matrix(params, name)

    def head_matrix(self, params: Params, name: str) -> Array:
        """Return a matrix [embed, classes] that is applied to one vector an image."""
        return self.matrix(params, name)

    def add_vectors(self, params: Params, y: Array, names: list[str]) -> Array:
        """Return y with vectors along the residual stream's embed added."""
        for name in names:
            y = y + self.vector(params, name).astype(y.dtype)
        return y

    # The two projections of a block's branch.

    def project_in(self, x: Array, params: Params, names: list[str]) -> list[Array]:
        """Return wide arrays, x @ params[name] for each name."""
        return [self.product(x, self.weight(params, name)) for name in names]

    def project_out(self, hs: list[Array], params: Params, names: list[str]) -> Array:
        """Return a summand of the residual stream, the sum of h @ params[name]."""
        weights = [self.matrix(params, name) for name in names]
        return sum(self.product_out(h, w) for h, w in zip(hs, weights, strict=True))

    def product(self, x: Array, w: Array, kind: Any = None) -> Array:
        """Return x @ w [embed, ...], heads apart where w has them apart."""
        if self.plan["columns"] and w.ndim > 2:
            return columns(x, w)
        return linear(x, w, kind)

    def product_out(self, h: Array, w: Array) -> Array:
        """Return h @ w [wide, embed], whose rows are those of all heads."""
        return columns_out(h, w) if self.plan["columns"] and h.ndim > 3 else linear_out(h, w)

    # Where things are.

    def residual(self, x: Array) -> Array:
        """Say that x is the residual stream (a constraint, where there is sharding)."""
        return x

    def own_tokens(self, x: Array, dim: int) -> Array:
        """Return the tokens of this device's part of the residual stream."""
        return x

    def query_tokens(self, x: Array, dim: int) -> Array:
        """Return the tokens that this device has between the projections of a block."""
        return x

    def own_embed(self, x: Array) -> Array:
        """Return this device's part of a last dimension that is embed."""
        return x

    def by_head(self, x: Array, call: Any = None) -> Array:
        """Return a wide array as [batch, tokens, heads, head_dim]; a call says in `width` which
        option of the model that is, where it is another."""
        if x.ndim == 4:
            return x
        width = (call or {}).get("width", "head_dim")
        return x.reshape(*x.shape[:2], -1, self.model[width])

    def all_keys(self, x: Array, text: bool = False) -> Array:
        """Return keys or values [batch, tokens, heads, head_dim] of the whole sequence, or of a
        `text`, unless attention brings them itself."""
        return x

    def key_tokens(self, keys: Array) -> Array:
        """Return where among the tokens the `keys` [batch, tokens, ...] stand that `all_keys` has
        brought."""
        return jnp.arange(keys.shape[1])

    def flash(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Any,
        positions: Array | None,
        sinks: Array | None = None,
    ) -> Array:
        """Return attention without all scores at once (see `flash_attention`)."""
        platform = self.plan["platform"]
        return flash_attention(q, k, v, mask, positions, platform, self.segments, sinks)

    # A video's tokens: frame by frame, or location by location where the plan switches.

    def by_location(self, x: Array) -> Array:
        """Return the residual stream split by location, where the plan switches."""
        return x

    def by_frame(self, x: Array) -> Array:
        """Undo `by_location`."""
        return x

    def has_sequences(self, along: str) -> bool:
        """Return whether each device has all tokens of a frame ("space"), or of a location
        ("time")."""
        return True

    def lie_in_turn(self, along: str) -> bool:
        """Return whether tokens of a frame, or of a location, lie one after another."""
        return along == "space"

    def sequences(self, x: Array, along: str) -> Array:
        """Return a wide array [batch, tokens, heads, head_dim] as one of frames, or locations, that
        are sequences: [batch x sequences, tokens of each, heads, head_dim]."""
        frames = self.model["frames"]
        locations = self.plan["sequence"] // frames
        if self.lie_in_turn(along):
            return x.reshape(-1, locations if along == "space" else frames, *x.shape[2:])
        x = x.reshape(len(x), -1, locations, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def tokens(self, x: Array, along: str, shape: tuple[int, ...]) -> Array:
        """Undo `sequences`, for an array of a `shape`."""
        if self.lie_in_turn(along):
            return x.reshape(shape)
        return x.reshape(shape[0], -1, *x.shape[1:]).swapaxes(1, 2).reshape(shape)

    def own_queries(self, x: Array) -> Array:
        """Return this device's heads, in the last dimension, of those of its tensor axis."""
        return x

    def handed(self, x: Array, whole: bool) -> Array:
        """Return the residual stream gathered over a tensor axis, or over all that split it."""
        return x

    def all_embed(self, x: Array) -> Array:
        """Return the residual stream gathered along embed, where a tensor axis splits that."""
        return x

    def all_columns(self, x: Array) -> Array:
        """Return an array whose last dimension a tensor axis splits, gathered."""
        return x

    # Sums over what may be split.

    def embed_sum(self, x: Array) -> Array:
        """Return the sum over devices that hold other parts of embed."""
        return x

    def tensor_sum(self, x: Array) -> Array:
        """Return the sum over devices that hold other parts of heads or of the MLP's width."""
        return x

    def residual_tokens(self, x: Array) -> Array:
        """Return the tokens of the residual stream, of those between the projections."""
        return x

    def second_sum(self, x: Array) -> Array:
        """Return the sum over the second tensor axis."""
        return x

    def context_sum(self, x: Array) -> Array:
        """Return the sum over devices that hold other tokens between the projections."""
        return x

    def context_max(self, x: Array) -> Array:
        """Return the maximum over devices that hold other tokens between the projections."""
        return x

    def vocab_sum(self, x: Array) -> Array:
        """Return the sum over devices that hold other parts of the vocabulary."""
        return x

    def vocab_max(self, x: Array) -> Array:
        """Return the maximum over devices that hold other parts of the vocabulary."""
        return x

    def vocab_start(self, columns: int) -> Array:
        """Return the first row of the vocabulary that this device has; it has `columns`."""
        return 0

    # Embeddings of a batch.

    row_members = 1  # devices that have different examples

    def first_row(self, rows: int) -> Array:
        """Return the first example of this device; it has so many `rows`."""
        return 0

    def all_rows(self, x: Array) -> Array:
        """Return embeddings [batch, width] of the whole batch."""
        return x

    def next_rows(self, x: Array) -> Array:
        """Send embeddings to the next device; return those of the one before."""
        return x

    # Experts.

    exchange_members = 1  # devices among which tokens are exchanged
    expert_members = 1  # devices that have different experts

    def routing(self, x: Array, whole: Array, params: Params) -> Array:
        """Return float32 logits [batch, tokens, experts] of the tokens of the residual stream; in
        `whole` they are gathered over a tensor axis."""
        w = self.matrix(params, "router").astype(jnp.float32)
        return jnp.einsum("bsk,kn->bsn", x.astype(jnp.float32), w)

    def over_tensor(self, x: Array, embed: bool) -> Array:
        """Gather an array of tokens over a tensor axis; its last dimension may be `embed`."""
        return x

    def over_experts(self, x: Array) -> Array:
        """Return an array of tokens where experts choose from it."""
        return x

    def experts_here(self, number: int) -> tuple[Array, int]:
        """Return the first expert that this device works with before any exchange, and how many."""
        return 0, number

    def exchange(self, x: Array) -> Array:
        """Exchange [experts or members, rows, embed]: each device gets the rows of its experts."""
        return x

    def exchange_back(self, x: Array) -> Array:
        """Undo `exchange`."""
        return x

    def expert_matrix(self, params: Params, name: str) -> Array:
        """Return the matrices of this device's experts, in the compute format."""
        return params[name].astype(self.compute)

    def expert_columns(self, value: Array, width: int) -> Array:
        """Return this device's part, of such a `width`, of an array's last dimension."""
        return value

    def expert_scatter(self, y: Array) -> Array:
        """Return the sum of what experts make, this device's part of the last dimension."""
        return y

    def expert_sum(self, y: Array) -> Array:
        """Return the sum over experts of other devices, as the residual stream lies."""
        return y

    # The ends.

    def tables(self, params: Params) -> tuple[Array, Array]:
        """Return the token embedding [vocab, embed] and the output head [embed, vocab]."""
        table = self.matrix(params, "token_embedding")
        return table, table.T if self.model["tied_embeddings"] else self.matrix(
            params, "output_head"
        )

    def look_up(self, table: Array, tokens: Array) -> Array:
        """Return the rows of the token embedding: [batch, tokens, embed]."""
        return table[tokens]

    def logits(self, x: Array, head: Array) -> Array:
        """Return float32 logits [batch, tokens, vocab]."""
        return logits_linear(x, head, self.plan["platform"])

    def pool(self, x: Array, share: Array) -> Array:
        """Return the sum over tokens of x * share[token]: [batch, 1, embed]."""
        return jnp.einsum("bse,s->be", x.astype(jnp.float32), share)[:, None]
