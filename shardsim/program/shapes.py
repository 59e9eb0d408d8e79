"""Sizes on one device: what a layout leaves of each dimension of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardsim.model import Model
from shardsim.plan.layout import REPLICATED, SEQUENCE_SHARDED, Layout, Number
from shardsim.plan.plan import DTYPE_BYTES, Plan, Precision


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, apart from how it is sharded."""

    model: Model
    batch: int  # sequences per step, over all chips
    sequence: int  # tokens per sequence
    precision: Precision = Precision()
    optimizer: str = "adamw"
    attention: str = "flash"
    fused_projections: bool = False
    pipeline_interleave: int = 1

    @classmethod
    def of(cls, plan: Plan) -> Workload:
        """Return the workload of a plan."""
        return cls(
            model=plan.model,
            batch=plan.batch,
            sequence=plan.sequence,
            precision=plan.precision,
            optimizer=plan.optimizer,
            attention=plan.attention,
            fused_projections=plan.fused_projections,
            pipeline_interleave=plan.pipeline_interleave,
        )

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in a matmul."""
        return DTYPE_BYTES[self.precision.compute]

    @property
    def wire_bytes(self) -> int:
        """Bytes of one element of a gathered weight or an activation: 8-bit formats are made
        inside the matmul, so what travels has 16 bits."""
        return max(2, self.compute_bytes)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one stored parameter, and of its gradient once reduced."""
        return DTYPE_BYTES[self.precision.parameters]

    @property
    def reduce_bytes(self) -> int:
        """Bytes of one element of a gradient on the wire."""
        return DTYPE_BYTES[self.precision.reduce]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Per device and microbatch. Widths are of the dimension that a matmul sees."""

    tokens: Number  # rows of every matmul: the tokens of one tensor group
    sequences: Number  # sequences of one tensor group
    queries: Number  # query positions of a sequence
    keys: Number  # key positions of a sequence, after any gathering
    embed: Number  # embed / tensor2
    q: Number  # heads * head_dim / tensor
    kv: Number  # keys and values together, / tensor as far as there are key-value heads
    hidden: Number  # mlp / tensor
    gates: int  # input projections of the MLP: 2 if gated
    inner: Number  # tensor * tensor2: what splits heads and hidden between the matmuls
    split2: Number  # tensor2
    residual: Number  # elements of the residual stream
    residual_tokens: Number  # rows of the residual stream
    heads: Number  # heads / (tensor * tensor2)
    layers: Number  # layers of one pipeline stage
    vocab: Number  # vocab / tensor, rounded up
    own_kv: Number  # keys and values together that one member of tensor2 attends with
    kv_summed: Number  # whether members of tensor2 share a key-value head, which all then sum

    @property
    def qkv(self) -> Number:
        """Output width of the query, key and value projections together."""
        return self.q + self.kv

    @property
    def mlp_in(self) -> Number:
        """Output width of the MLP's input projections together."""
        return self.hidden * self.gates

    @property
    def scores(self) -> Number:
        """Query-key pairs, all heads."""
        return self.sequences * self.heads * self.queries * self.keys

    @property
    def layer_weights(self) -> Number:
        """Elements of one layer's matrices after gathering."""
        return self.embed * (self.qkv + self.q + self.mlp_in + self.hidden)


def shapes(work: Workload, layout: Layout) -> Shapes:
    """Return the sizes that `layout` leaves on one device."""
    model = work.model
    tensor, tensor2 = layout.tensor.size, layout.tensor2.size
    groups = layout.data.size * layout.fsdp.size * layout.microbatches
    sequences = work.batch / groups
    queries = work.sequence / layout.context.size
    tokens = sequences * queries
    embed = model.embed / tensor2
    inner = tensor * tensor2
    on_tensor = np.where(np.equal(layout.residual, REPLICATED), 1, tensor)
    tokens_on_tensor = np.where(np.equal(layout.residual, SEQUENCE_SHARDED), tensor, 1)
    kv_split = np.minimum(tensor, model.kv_heads)
    kv_heads = model.kv_heads / kv_split
    return Shapes(
        tokens=tokens,
        sequences=sequences,
        queries=queries,
        keys=float(work.sequence),
        embed=embed,
        q=model.heads * model.head_dim / tensor,
        kv=2.0 * kv_heads * model.head_dim,
        hidden=model.mlp / tensor,
        gates=2 if model.gated_mlp else 1,
        inner=inner,
        split2=tensor2,
        residual=tokens * embed / on_tensor,
        residual_tokens=tokens / tokens_on_tensor,
        heads=model.heads / inner,
        layers=model.layers / layout.pipeline.size,
        vocab=np.ceil(model.vocab / tensor),
        own_kv=2.0 * np.maximum(kv_heads / tensor2, 1.0) * model.head_dim,
        kv_summed=np.not_equal(np.mod(kv_heads, tensor2), 0),
    )
