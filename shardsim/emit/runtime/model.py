"""The Transformer: a ViT or a decoder, with every block option, layers under one scan.

Everything that sharding touches is asked of `way` (`Whole`, `Explicit` or `Partitioned`); the
model below reads the same for one device and for a pod.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from shardsim.emit.runtime.config import Data
from shardsim.emit.runtime.whole import Array, Params, Whole, patchify, softmax_attention

EPSILON = 1e-6
ACTIVATE = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
QKV = ["query", "key", "value"]


def loss_sum(way: Whole, params: Params, batch: Params) -> Array:
    """Return this device's share of the sum of losses over a microbatch.

    The shares of all devices add up to the whole: where several compute the same loss, each
    counts for its part, so that gradients are sums over devices whatever the sharding.
    """
    table, head = way.tables(params) if way.model["vocab"] else (None, None)
    x = transformer(way, params, embed(way, params, batch, table))
    if way.model["final_norm"]:
        x = norm(way, params, "final_norm", x)
    if way.model["vocab"]:
        return token_loss(way, x, head, batch["targets"])
    return image_loss(way, params, x, batch)


def transformer(way: Whole, params: Params, x: Array) -> Array:
    """Run all layers under one scan; each keeps for its backward pass what the plan says."""
    stacked = {
        name: value for name, value in params.items() if way.parameters[name]["part"] == "block"
    }

    def layer(x: Array, weights: Params) -> tuple[Array, None]:
        return block(way, weights, x), None

    policy = remat_policy(way.plan)
    body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return lax.scan(body, x, stacked)[0]


def remat_policy(plan: Data) -> Any:
    """Return the checkpoint policy: keep the named tensors of the plan, compute the rest again.

    Gathered weights and inputs carry no name, so the backward pass always gathers them again.
    Where there is no host memory to offload to (CPU), those tensors are kept.
    """
    policies = jax.checkpoint_policies
    save, offload = plan["remat"]["save"], plan["remat"]["offload"]
    if offload and plan["platform"] != "cpu":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=save,
            names_which_can_be_offloaded=offload,
            offload_src="device",
            offload_dst="pinned_host",
        )
    kept = [name for name in offload if name != "layer_input"]
    return policies.save_only_these_names(*save, *kept)


def block(way: Whole, p: Params, x: Array) -> Array:
    """One layer, x [batch, tokens, embed]: attention and MLP, side by side or in turn."""
    model = way.model
    x = way.residual(checkpoint_name(x, "layer_input"))
    mlp = ["mlp_in", "mlp_gate"] if model["gated_mlp"] else ["mlp_in"]
    if model["parallel_block"]:
        h = norm(way, p, "block_norm", x)
        q, k, v, *hidden = way.project_in(h, p, QKV + mlp)
        context = attention(way, p, q, k, v)
        hidden = mlp_middle(way, p, hidden)
        if not model["post_norms"]:
            y = way.project_out([context, hidden], p, ["attention_output", "mlp_out"])
            y = add_vectors(way, p, y, ["attention_output_bias", "mlp_out_bias"])
            return way.residual(x + y)
        return way.residual(x + attention_end(way, p, context) + mlp_end(way, p, hidden))
    q, k, v = way.project_in(norm(way, p, "attention_norm", x), p, QKV)
    x = way.residual(x + attention_end(way, p, attention(way, p, q, k, v)))
    hidden = way.project_in(norm(way, p, "mlp_norm", x), p, mlp)
    return way.residual(x + mlp_end(way, p, mlp_middle(way, p, hidden)))


def attention(way: Whole, p: Params, q: Array, k: Array, v: Array) -> Array:
    """Return the weighted values [batch, tokens, heads * head_dim], before their projection."""
    model = way.model
    batch, tokens, width = q.shape
    q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
    if "query_bias" in p:
        names = ("query_bias", "key_bias", "value_bias")
        q, k, v = (x + way.wide_vector(p, n) for x, n in zip((q, k, v), names, strict=True))
    q, k, v = (x.reshape(batch, tokens, -1, model["head_dim"]) for x in (q, k, v))
    if model["qk_norm"]:
        q, k = head_norm(way, p, "query_norm", q), head_norm(way, p, "key_norm", k)
    positions = way.query_tokens(jnp.arange(way.plan["sequence"]), 0)
    if model["positions"] == "rotary":
        q, k = rotate(q, positions), rotate(k, positions)
    q, k = checkpoint_name(q, "rest"), checkpoint_name(k, "rest")
    k, v = way.all_keys(k), way.all_keys(v)
    positions = positions if model["causal"] else None
    if way.plan["attention"] == "flash":
        return way.flash(q, k, v, positions).reshape(batch, tokens, width)
    mask = None if positions is None else positions[:, None] >= jnp.arange(k.shape[1])
    context = softmax_attention(q, k, v, mask, lambda x: checkpoint_name(x, "rest"))
    return checkpoint_name(context.reshape(batch, tokens, width), "context")


def attention_end(way: Whole, p: Params, context: Array) -> Array:
    """Return what attention adds to the residual stream."""
    y = checkpoint_name(way.project_out([context], p, ["attention_output"]), "attention_output")
    y = add_vectors(way, p, y, ["attention_output_bias"])
    return norm(way, p, "post_attention_norm", y) if way.model["post_norms"] else y


def mlp_middle(way: Whole, p: Params, hidden: list[Array]) -> Array:
    """Return the activated (and gated) hidden layer."""
    hidden = [checkpoint_name(h, "mlp_hidden") for h in hidden]
    for i, name in enumerate(("mlp_in_bias", "mlp_gate_bias")):
        if name in p:
            hidden[i] = hidden[i] + way.wide_vector(p, name)
    active = ACTIVATE[way.model["activation"]]
    if way.model["gated_mlp"]:
        return checkpoint_name(active(hidden[1]) * hidden[0], "rest")
    return checkpoint_name(active(hidden[0]), "rest")


def mlp_end(way: Whole, p: Params, hidden: Array) -> Array:
    """Return what the MLP adds to the residual stream."""
    y = checkpoint_name(way.project_out([hidden], p, ["mlp_out"]), "mlp_output")
    y = add_vectors(way, p, y, ["mlp_out_bias"])
    return norm(way, p, "post_mlp_norm", y) if way.model["post_norms"] else y


def add_vectors(way: Whole, p: Params, y: Array, names: list[str]) -> Array:
    for name in names:
        if name in p:
            y = y + way.vector(p, name).astype(y.dtype)
    return y


def norm(way: Whole, p: Params, name: str, x: Array, kind: str = "") -> Array:
    """Normalise over embed in float32; its two sums may have to cross devices."""
    wide = x.astype(jnp.float32)
    width = way.model["embed"]
    kind = kind or way.model["norm"]
    sums = [jnp.sum(wide * wide, -1)] + ([jnp.sum(wide, -1)] if kind == "layernorm" else [])
    with jax.named_scope("norm_statistics"):
        moments = way.embed_sum(jnp.stack(sums, -1)) / width
    moments = checkpoint_name(moments, "rest")
    square = moments[..., :1]
    if kind == "layernorm":
        mean = moments[..., 1:]
        wide, square = wide - mean, square - mean * mean
    y = wide * lax.rsqrt(square + EPSILON) * way.vector(p, f"{name}_scale")
    if f"{name}_bias" in p:
        y = y + way.vector(p, f"{name}_bias")
    return checkpoint_name(y.astype(x.dtype), "rest")


def head_norm(way: Whole, p: Params, name: str, x: Array) -> Array:
    """Normalise each head of queries or keys [batch, tokens, heads, head_dim]."""
    wide = x.astype(jnp.float32)
    if way.model["norm"] == "layernorm":
        wide = wide - wide.mean(-1, keepdims=True)
    y = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPSILON)
    y = y * p[f"{name}_scale"].astype(jnp.float32)
    if f"{name}_bias" in p:
        y = y + p[f"{name}_bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def rotate(x: Array, positions: Array) -> Array:
    """Rotary position embedding: turn pairs (i, i + head_dim / 2) by position * 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sine, cosine = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    low, high = jnp.split(x.astype(jnp.float32), 2, -1)
    turned = [low * cosine - high * sine, high * cosine + low * sine]
    return jnp.concatenate(turned, -1).astype(x.dtype)


def embed(way: Whole, params: Params, batch: Params, table: Array) -> Array:
    """Return the residual stream before the first layer, in the compute format."""
    model = way.model
    if model["vocab"]:
        x = way.look_up(table, batch["tokens"])
    else:
        pixels = patchify(batch["images"], model["patch"])
        if model["pooling"] == "cls":
            pixels = jnp.pad(pixels, ((0, 0), (1, 0), (0, 0)))
        pixels = way.own_tokens(pixels, 1).astype(way.compute)
        x = jnp.einsum("bsp,pe->bse", pixels, way.end_matrix(params, "patch_embedding"))
        x = add_vectors(way, params, x, ["patch_embedding_bias"])
        if model["pooling"] == "cls":
            first = way.own_tokens(jnp.arange(way.plan["sequence"]), 0) == 0
            x = jnp.where(first[:, None], way.vector(params, "cls_token").astype(x.dtype), x)
    if model["positions"] == "learned":
        table = way.end_matrix(params, "position_embedding")[: way.plan["sequence"]]
        x = x + way.own_tokens(table, 0)
    elif model["positions"] == "fixed":
        waves = sinusoids(way.plan["sequence"], model["embed"])
        x = x + way.own_tokens(way.own_embed(waves), 0).astype(x.dtype)
    return way.residual(x)


def sinusoids(tokens: int, width: int) -> Array:
    """Return fixed positions [tokens, embed]: sines, then cosines (arXiv 1706.03762, 3.5)."""
    half = (width + 1) // 2
    angle = jnp.arange(tokens)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[:, :width]


def token_loss(way: Whole, x: Array, head: Array, targets: Array) -> Array:
    """Return the summed cross-entropy of the next tokens; the vocabulary may be split."""
    logits = way.logits(x, head)
    columns = jnp.arange(logits.shape[-1]) + way.vocab_start(logits.shape[-1])
    logits = jnp.where(columns < way.model["vocab"], logits, -1e30)  # padding
    with jax.named_scope("loss_statistics"):
        top = way.vocab_max(lax.stop_gradient(logits).max(-1))
        is_target = columns == way.query_tokens(targets, 1)[..., None]
        right = jnp.sum(jnp.where(is_target, logits - top[..., None], 0), -1)
        sums = way.vocab_sum(jnp.stack([jnp.exp(logits - top[..., None]).sum(-1), right]))
    return jnp.sum(jnp.log(sums[0]) - sums[1]) / way.copies


def image_loss(way: Whole, params: Params, x: Array, batch: Params) -> Array:
    """Return the summed cross-entropy of the classes, or squared error of pooled features."""
    model = way.model
    with jax.named_scope("pooling"):
        if model["pooling"] == "map":
            pooled = map_head(way, params, x)
        else:
            tokens = way.plan["sequence"]
            share = jnp.ones(tokens) / tokens
            if model["pooling"] == "cls":
                share = jnp.arange(tokens) == 0
            pooled = way.pool(x, way.own_tokens(share.astype(jnp.float32), 0)).astype(x.dtype)
        flat = way.flat()
        if not model["classes"]:
            target = flat.own_embed(batch["features"])
            error = flat.embed_sum(jnp.sum((pooled[:, 0].astype(jnp.float32) - target) ** 2, -1))
            return jnp.sum(error) / model["embed"] / flat.copies
        weights = flat.head_matrix(params, "classifier")
        logits = jnp.einsum("be,ec->bc", pooled[:, 0], weights, preferred_element_type=jnp.float32)
        logits = flat.second_sum(logits) + params["classifier_bias"].astype(jnp.float32)
    scores = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.take_along_axis(scores, batch["labels"][:, None], 1)) / flat.copies


def map_head(way: Whole, params: Params, x: Array) -> Array:
    """Pool by attention: one learned query per head attends to all tokens; then an MLP.

    As big_vision's MAPHead (models/vit.py): x [batch, tokens, embed] to [batch, 1, embed].
    """
    model, flat = way.model, way.flat()
    probe = flat.vector(params, "pooling_probe").astype(x.dtype)
    probe = jnp.broadcast_to(probe, (x.shape[0], 1, *probe.shape))
    (q,) = flat.project_in(probe, params, ["pooling_query"])
    k, v = way.project_in(x, params, ["pooling_key", "pooling_value"])
    q, k, v = (
        (y + way.wide_vector(params, f"pooling_{name}_bias")).reshape(
            *y.shape[:2], -1, model["head_dim"]
        )
        for y, name in zip((q, k, v), QKV, strict=True)
    )
    scores = jnp.einsum("bhd,bkhd->bhk", q[:, 0], k, preferred_element_type=jnp.float32)
    scores = scores * model["head_dim"] ** -0.5
    weights = jnp.exp(scores - way.context_max(lax.stop_gradient(scores).max(-1))[..., None])
    values = way.context_sum(jnp.einsum("bhk,bkhd->bhd", weights, v.astype(jnp.float32)))
    context = values / way.context_sum(weights.sum(-1))[..., None]
    context = context.astype(x.dtype).reshape(x.shape[0], 1, -1)
    y = flat.project_out([context], params, ["pooling_attention_output"])
    y = add_vectors(flat, params, y, ["pooling_attention_output_bias"])
    h = norm(flat, params, "pooling_norm", y, "layernorm")
    (h,) = flat.project_in(h, params, ["pooling_mlp_in"])
    h = jax.nn.gelu(h + flat.wide_vector(params, "pooling_mlp_in_bias"))
    z = flat.project_out([h], params, ["pooling_mlp_out"])
    return y + add_vectors(flat, params, z, ["pooling_mlp_out_bias"])
