"""One block of a Transformer as a list of ops: attention and MLP, or what stands in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsim.graph.arrays import Array, Dims, Op, weights_of
from shardsim.graph.build import Builder, stream
from shardsim.model.lora import EXPERTS
from shardsim.ops.activate import activate
from shardsim.ops.add import add
from shardsim.ops.attend import GLOBAL_HEADS, GLOBAL_KV, HEADS, KERNELS, KV, attend
from shardsim.ops.attend_mask import BLOCKS, Mask
from shardsim.ops.cross import cross_attend, cross_keys, memory
from shardsim.ops.delta import KEYS as DELTA_KEYS
from shardsim.ops.delta import VALUES as DELTA_VALUES
from shardsim.ops.delta import delta_rule, gated_norm, short_conv
from shardsim.ops.exchange import combine, dispatch, reach
from shardsim.ops.experts import experts
from shardsim.ops.index import token_index
from shardsim.ops.latent import (
    RESULT,
    attend_latents,
    latent_keys,
    latent_norm,
    latent_up,
    rotate_part,
)
from shardsim.ops.modulate import gated_add, modulated_norm, modulation
from shardsim.ops.norm import head_norm, norm
from shardsim.ops.project import project_in, project_out
from shardsim.ops.relative import attend_biased, position_bias
from shardsim.ops.rotate import rotate
from shardsim.ops.route import route
from shardsim.ops.scale import head_gate, heads_norm, layer_scale, residual_scale, token_gate
from shardsim.ops.soft import soft_experts
from shardsim.ops.video import attend_along, by_frame, by_location

if TYPE_CHECKING:
    from shardsim.model.delta import Delta
    from shardsim.model.experts import Experts
    from shardsim.model.latent import Latent
    from shardsim.model.spec import Model


# Of a layer: its window, whether it has experts, and along what of a video it attends, "" for all
# tokens, or `STATE` for linear attention.
LayerKind = tuple[int, bool, str]
STATE = "linear attention"

BRANCH = "branch_embed"
# Parts of a modulation: the first of each branch (its shift, scale, gate), and where its gate is.
BRANCHES, GATE = {"attention": 0, "mlp": 3}, 2


def _of_width(array: Array) -> Array:
    """Return an array of the residual stream's width as one of a branch's."""
    dims = ((BRANCH if d == "embed" else "branch_norm" if d == "norm" else d) for d in array.dims)
    renamed = tuple((a, BRANCH if b == "embed" else b) for a, b in array.renamed)
    original = array.original and _of_width(array.original)
    return replace(array, dims=tuple(dims), renamed=renamed, original=original)


def _of_branch(op: Op, inside: set[str]) -> Op:
    """Return an op of a branch of another width; what is read of the stream, and the weights that
    read it, keep theirs."""
    read = {(array.original or array).name for array in op.ins} & inside

    def one(array: Array) -> Array:
        return array if array.name in inside or (read and array.weight) else _of_width(array)

    def each(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(map(one, arrays))

    return replace(
        op, ins=each(op.ins), out=one(op.out), needs=each(op.needs), vectors=each(op.vectors)
    )


class Block(Builder):
    """A block of a Transformer: attention and MLP, in turn or side by side on one norm."""

    def __init__(self, model: Model, attention: str, kind: LayerKind) -> None:
        window, experts, along = kind
        super().__init__()
        self.experts = experts
        chosen = model.index.top if model.index else 0
        blocks = KERNELS[attention].blocks if attention in KERNELS else BLOCKS
        chunked = model.chunked and window > 0
        self.mask = Mask(model.causal, window, along, chosen, blocks, chunked)
        self.model = model
        self.kernel = attention
        self.wide = None if window else model.global_heads
        self.delta = model.delta if along == STATE else None
        x = stream("x")
        if along == "time":
            x = by_location(self, x)
        if model.branch:
            x = self.narrow(x)
        else:
            x = self.parallel(x) if model.parallel_block else self.serial(x)
        if along == "time":
            by_frame(self, x)

    def serial(self, x: Array) -> Array:
        """Add attention to x, then to other tokens that there are, then the MLP; return the sum."""
        model, made = self.model, None
        if model.modulation != "none":
            made = modulation(self, model.modulation)
        for name in ("attention", "cross", "mlp") if model.memory_tokens else ("attention", "mlp"):
            out = stream(name, "mlp_output" if name == "mlp" else "attention_output")
            after, first = stream(f"x after {name}", keep=""), BRANCHES.get(name, 0)
            numbers = made if name in BRANCHES else None
            outs, normed = [out], x
            if numbers is not None:
                normed = stream(f"{name} input")
                modulated_norm(self, x, normed, numbers, kind=model.norm, first=first, stored=True)
            elif model.pre_norms and not model.deepnorm:
                normed = self.norm(f"{name}_norm", x)
            if name == "attention":
                self.attention(normed, out)
            elif name == "cross":
                self.cross_attention(normed, out)
            elif self.experts:
                outs = self.mixture(x, normed, out)
            else:
                self.mlp(normed, out)
            if numbers is not None:
                x = gated_add(self, x, out, numbers, after, first + GATE)
                continue
            if model.post_norms or (model.mlp_post_norm and name == "mlp"):
                outs = [self.norm(f"post_{one.name}_norm", one) for one in outs]
                if len(outs) > 1 and model.experts and model.experts.apart:
                    both = add(self, outs[0], outs[1:], stream("both", keep=""))
                    outs = [self.norm("post_both_norm", both)]
            if model.layer_scale:
                outs = [layer_scale(self, one) for one in outs]
            x = add(self, x, outs, after, scale=model.deepnorm or 1.0)
            if model.deepnorm:
                x = self.norm(f"{name}_norm", x, stream(f"{after.name} normed"))
        if model.residual_scale:
            x = residual_scale(self, x)
        return x

    def narrow(self, x: Array) -> Array:
        """Add attention and then experts, both on a branch of another width, whose result is
        projected to x's (MaxText's Qwen3-Custom); return the sum."""
        normed = self.norm("attention_norm", x)
        first = len(self.made)
        out = stream("attention", "attention_output")
        self.attention(normed, out)
        (result,) = self.mixture(out, self.norm("mlp_norm", out), out)
        inside = {normed.name, f"{normed.name} sums"}
        self.made[first:] = [_of_branch(op, inside) for op in self.made[first:]]
        wide = stream("branch", "mlp_output")
        back = _of_width(result).view(**{BRANCH: "branch_mlp"})
        project_out(self, "branch_output", back, wide, ("branch_mlp",), bias=False)
        return add(self, x, [wide], stream("x after branch", keep=""))

    def parallel(self, x: Array) -> Array:
        """Add attention and MLP to x at once, as one sum, or each behind its own norm; return the
        result."""
        if self.model.parallel_norms:
            normed, second = (self.norm(f"{name}_norm", x) for name in ("attention", "mlp"))
        else:
            normed = second = self.norm("block_norm", x)
        if not self.model.post_norms:
            out = stream("y", "attention_output")
            self.attention(normed, out)
            self.mlp(second, out)
            return add(self, x, [out], stream("result", keep=""))
        outs = [stream(name, f"{name}_output") for name in ("attention", "mlp")]
        first = len(self.made)
        branches = ((self.attention, normed), (self.mlp, second))
        for (branch, read), out in zip(branches, outs, strict=True):
            branch(read, out)
            self.made[first:] = [replace(op, call=out.name) for op in self.made[first:]]
            first = len(self.made)
        outs = [self.norm(f"post_{out.name}_norm", out) for out in outs]
        return add(self, x, outs, stream("result", keep=""))

    def norm(self, name: str, source: Array, out: Array | None = None) -> Array:
        """Add a norm of the residual stream: of what a branch reads, or, "post", of its result; or
        the stream itself, as `out`."""
        model, before = self.model, not name.startswith("post")
        if out is None:
            out = stream(name.replace("_norm", " input") if before else f"{name} result")
        kind, bias = model.norm, model.biases.norm
        return norm(self, name, source, out, kind=kind, bias=bias, stored=before)

    def attention(self, normed: Array, out: Array) -> None:
        """Add attention: q, k, v, softmax(QK^T)V and its output projection."""
        model, biases = self.model, self.model.biases
        bias = biases.attention_output
        if self.delta:
            context = self.linear_attention(normed, self.delta)
            project_out(self, "delta_output", context, out, DELTA_VALUES, bias=bias)
            return
        if model.latent:
            context = self.latent_attention(normed, model.latent)
            project_out(self, "attention_output", context, out, RESULT, bias=bias)
            return
        of, heads, keys = ("global_", GLOBAL_HEADS, GLOBAL_KV) if self.wide else ("", HEADS, KV)
        parts, projected = [], stream("")
        for name, dims in (("query", heads), ("key", keys), ("value", keys)):
            if name != "value" or not (self.wide and self.wide.values_are_keys):
                projected = self.into(
                    f"{of}{name}", normed, name[0], dims, keep="qkv", bias=biases.qkv
                )
            if name == "value":
                parts.append(self.values(projected))
                continue
            part = self.qk_norm(f"{of}{name}", projected)
            parts.append(rotate(self, part) if model.positions == "rotary" else part)
        if model.positions == "relative":
            q, k, v = parts
            context = attend_biased(self, q, k, v, position_bias(), self.mask)
        elif self.mask.along:
            context = attend_along(self, *parts, mask=self.mask, kernel=self.kernel)
        else:
            context = attend(self, *parts, mask=self.mask, kernel=self.kernel, sinks=model.sinks)
        if model.output_gate:
            gate = self.into(f"{of}attention_gate", normed, "gate", heads, keep="qkv", bias=False)
            context = head_gate(self, context, gate)
        context = self.sub_norm("attention_inner_norm", context)
        self.back(f"{of}attention_output", context, out, heads, bias=bias)

    def linear_attention(self, normed: Array, delta: Delta) -> Array:
        """Add the gated delta rule, up to its output projection."""
        made = {"query": DELTA_KEYS, "key": DELTA_KEYS, "value": DELTA_VALUES, "gate": DELTA_VALUES}
        made |= dict.fromkeys(("beta", "decay"), DELTA_VALUES[:1])
        parts = {
            name: self.into(
                f"delta_{name}", normed, f"{STATE}, {name}", dims, keep="rest", bias=False
            )
            for name, dims in made.items()
        }
        q, k, v = (
            short_conv(self, f"delta_{name}", parts[name]) for name in ("query", "key", "value")
        )
        context = delta_rule(self, q, k, v, parts["beta"], parts["decay"], chunk=delta.chunk)
        return gated_norm(self, context, parts["gate"])

    def sub_norm(self, name: str, x: Array) -> Array:
        """Add a norm of what an output projection reads, if the model has one."""
        if not self.model.sub_norms:
            return x
        return heads_norm(self, name, x, kind=self.model.norm, bias=self.model.biases.norm)

    def values(self, x: Array) -> Array:
        """Add a norm of values, if the model has one: without a weight."""
        if not self.model.value_norm:
            return x
        return head_norm(
            self, "value_norm", x, kind="rmsnorm", bias=False, scale=False, out="v normed"
        )

    def qk_norm(self, name: str, x: Array) -> Array:
        """Add a norm of queries or keys, if the model has one."""
        model = self.model
        if not model.qk_norm:
            return x
        kind = model.qk_norm_kind or model.norm
        bias = model.biases.norm and kind == "layernorm"
        if model.qk_norm_over != "head":
            return heads_norm(self, f"{name}_norm", x, kind=kind, bias=bias)
        stored = self.kernel != "unfused"
        return head_norm(self, f"{name}_norm", x, kind=kind, bias=bias, stored=stored)

    def into(self, name: str, x: Array, out: str, dims: Dims, *, keep: str, bias: bool) -> Array:
        """Add a projection out of the residual stream."""
        adapted = self.adapts(name)
        return project_in(self, name, x, out, dims, keep=keep, bias=bias, adapted=adapted)

    def back(self, name: str, x: Array, out: Array, dims: Dims, *, bias: bool) -> None:
        """Add a projection that adds to the residual stream."""
        project_out(self, name, x, out, dims, bias=bias, adapted=self.adapts(name))

    def adapts(self, name: str) -> bool:
        """Return whether a projection has an adapter."""
        return self.model.lora is not None and name in self.model.lora.on

    def cross_attention(self, normed: Array, out: Array) -> None:
        """Add attention to the tokens of the encoder."""
        model, biases = self.model, self.model.biases
        trained = model.encoder is None or not model.encoder.frozen
        q = self.into("cross_query", normed, "cross q", HEADS, keep="qkv", bias=biases.qkv)
        k, v = cross_keys(self, memory(trained=trained), bias=biases.qkv)
        q, k = self.qk_norm("cross_query", q), self.qk_norm("cross_key", k)
        context = cross_attend(self, q, k, v, kernel=self.kernel, text=model.encoder is None)
        bias = biases.attention_output
        context = self.sub_norm("cross_inner_norm", context)
        self.back("cross_attention_output", context, out, HEADS, bias=bias)

    def latent_attention(self, normed: Array, latent: Latent) -> Array:
        """Add attention out of latents, up to its output projection."""
        query = ("query_down", "query latent", ("query_rank",))
        made = (
            query if latent.queries else ("query", "q", HEADS),
            ("key_value_down", "key value latent", ("key_value_rank",)),
            ("shared_key", "shared key", ("rotary",)),
        )
        q, both, shared = (
            project_in(self, name, normed, out, dims, keep="qkv", bias=False)
            for name, out, dims in made
        )
        chosen, index = None, self.model.index
        if latent.queries:
            q = latent_norm(self, "query_down_norm", q)
            if index:
                chosen = token_index(self, normed, q, rotary=latent.rotary, **vars(index))
            (q,) = latent_up(self, q, "query_latent", {"query": ("q", HEADS)})
        q = rotate_part(self, q, rotary=latent.rotary, head_dim=self.model.head_dim)
        both = latent_norm(self, "key_value_down_norm", both)
        ups = {"key": ("k", ("kv", "nope")), "value": ("v", ("kv", "value_dim"))}
        k, v = latent_up(self, both, "key_value_latent", ups)
        k = latent_keys(self, k, shared)
        sinks = self.model.sinks
        return attend_latents(
            self, q, k, v, mask=self.mask, kernel=self.kernel, sinks=sinks, chosen=chosen
        )

    def mlp(self, normed: Array, out: Array, name: str = "mlp") -> None:
        """Add an MLP, gated or not; `name` is what its weights and its width are called by."""
        model, bias = self.model, self.model.biases.mlp
        dims = ("mlp",) if name == "mlp" else (f"{name}_mlp",)
        prefix = "" if name == "mlp" else f"{name} "
        made = {f"{name}_in": "up"} | ({f"{name}_gate": "gate"} if model.gated_mlp else {})
        parts = [
            self.into(weight, normed, prefix + part, dims, keep="mlp_hidden", bias=bias)
            for weight, part in made.items()
        ]
        hidden = activate(self, parts, model.activation, f"{prefix}hidden")
        hidden = self.sub_norm(f"{name}_inner_norm", hidden)
        self.back(f"{name}_out", hidden, out, dims, bias=bias)

    def soft_mixture(self, normed: Array, made: Experts) -> Array:
        """Add experts on slots that are means of tokens; return what they add to x."""
        model, out, first = self.model, stream("experts", keep=""), len(self.made)
        bias = model.biases.mlp
        soft_experts(self, normed, out, gated=model.gated_mlp, bias=bias)
        self.call(
            "soft_experts",
            [normed],
            out,
            weights=weights_of(self.made[first:]),
            number=made.number,
            gated=model.gated_mlp,
            activation=model.activation,
            bias=bias,
        )
        return out

    def mixture(self, x: Array, normed: Array, out: Array) -> list[Array]:
        """Add experts, and beside them shared ones and an MLP; return what each adds to x.

        They read `normed`, or, where they are apart, x behind norms of their own.
        """
        model, made = self.model, self.model.experts
        assert made is not None
        if made.soft_slots:
            return [self.soft_mixture(normed, made)]
        grouped, capacity = made.group > 0, made.capacity > 0
        tokens = asking = normed
        if made.apart:
            tokens, asking = self.norm("experts_norm", x), self.norm("router_norm", x)
        adapted = list(filter(self.adapts, EXPERTS))
        more: dict[str, Any] = {"adapted": adapted} if adapted else {}
        routed, first = stream("experts", keep=""), len(self.made)
        bias, scales = made.router_bias, made.scales
        chances, choices = route(
            self, asking, top=made.top_k, kind=made.router, bias=bias, scales=scales
        )
        reached = reach(self, chances, "chances of experts")
        chosen = reach(self, choices, "choices of experts")
        slots = dispatch(self, tokens, chosen, top=made.top_k, grouped=grouped, capacity=capacity)
        results = experts(
            self,
            slots,
            gated=model.gated_mlp,
            bias=model.biases.mlp,
            sorted_by=not capacity,
            adapted=adapted,
        )
        combine(self, results, reached, routed, top=made.top_k, grouped=grouped, capacity=capacity)
        self.call(
            "experts",
            [tokens, asking] if made.apart else [tokens],
            routed,
            weights=weights_of(self.made[first:]),
            router=made.router,
            router_bias=made.router_bias,
            **({"scales": True} if scales else {}),
            number=made.number,
            top=made.top_k,
            capacity=made.capacity,
            group=made.group,
            gated=model.gated_mlp,
            activation=model.activation,
            bias=model.biases.mlp,
            **more,
        )
        outs = [routed]
        if made.shared:
            outs.append(stream("shared", "mlp_output"))
            self.mlp(normed, outs[-1], "shared")
            if made.shared_gate:
                outs[-1] = token_gate(self, normed, outs[-1])
        if made.beside:
            self.mlp(normed, out)
            outs.append(out)
        return outs
