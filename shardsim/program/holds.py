"""What implementations hold in HBM beyond the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from shardsim.errors import PlanError, nearest
from shardsim.machine import Chip


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What an implementation holds beyond the plan; the defaults are the least that is needed.

    What is said of compiled programs was read off the buffers that the TPU compiler listed as live
    at the peaks of emitted steps (libtpu 0.0.42): ViT-22B on v4 fully sharded, the same with 4
    microbatches, with rings of 4 and 8 over the sequence and of 8 over embed, with 4 and no rings,
    2-D; maxtext-16b on v5e fully sharded and with a ring of 4; llama2-70b on v5p with a ring of 4.
    """

    # Matmuls before the first that needs it that a weight's gather starts, if they may overlap.
    gathers_ahead: int = 1
    # Later gradients of weights that are computed before one is scattered. Three to five whole
    # matrices, coming or going, were there in every fully sharded program.
    gradients_waiting: int = 0
    # Shards of weights are cast to the compute format once a step, for all layers: MaxText's
    # programs on v5e, v6e and v5p (half of their float32 parameters), emitted ones as well.
    cast_ahead: bool = False
    # So they are where nothing gathers them, too: emitted programs of data and tensor axes alone
    # (qwen3-14b, palm-8b). No such program of MaxText was compiled.
    cast_ungathered: bool = True
    # In stacks of casts and gradients the layer is outermost (`plan/tiles.py`), as a loop over
    # layers makes them: emitted programs (vit-bigg and gpt-neox-20b on v5e, vit-h-14 on v5p). Not
    # in MaxText's, whose weights have it second: f32[32,20,32768]{2,0,1} in maxtext-16b on v5e.
    layers_outermost: bool = True
    # Gradients lie in the format in which they are summed over devices until the optimizer reads
    # them: the stacks of all seven emitted steps that were looked at (ViT-22B on v4 and v5p with 32
    # shards and on v4 with a tensor axis, llama2-70b on v5p, maxtext-22b and palm-8b on v4).
    narrow_gradients: bool = True
    # What is kept in float32 for nothing but products, which round it to bf16, is kept in that (XLA
    # moves the rounding to where an array is made): the stacks of a GPT of 12 layers in float32 on
    # v3, of two sizes and in two versions of the compiler.
    narrow_kept: bool = True
    # Products of 8 bits keep the operand that they made of what nothing else reads (Transformer
    # Engine's `Linear`: NVIDIA/TransformerEngine, pytorch/module/linear.py).
    keeps_operands: bool = False
    # A microbatch's gradients are added to the sum one by one as they come (PyTorch's autograd).
    adds_in_place: bool = False
    # Gradients of an MLP's weights come after those of attention, where it stands behind that: in
    # the layer that prefetching peels off the loop nothing is gathered that they would hide, in
    # others some wait too (vit-h-14 on v4, vit-bigg on v5e and vit-l-16 on v4 and v5p, with scores
    # in HBM and with the kernel; not mae-l-16 on v6e).
    mlp_waits: bool = False
    # So of a kernel, where a layer has one and attends to all tokens (not where frames attend to
    # frames and locations to locations, and both are exchanged, on v5p).
    mlp_waits_for_kernels: bool = False
    # With what that of the last one multiplies; without prefetching that one comes at once
    # (vit-h-14 on v4 and v5p, vit-bigg on v5e).
    hidden_waits: bool = False
    # Where layers gather nothing but weights, and those beside the layer before, a parallel block's
    # attention runs back before its MLP runs again: ViT-22B on v4, v5p and v6e, also in four
    # microbatches and with fused attention, maxtext-16b on v5e and v6e and maxtext-22b on v4 (not
    # with fused attention and a relu: maxtext-22b). What is made of scores in HBM then stays until
    # gradients of queries and keys are made of it.
    attends_first: bool = False
    # So too where layers gather weights at once, but its hidden layer is made again first (ViT-22B
    # on v4, v5p and v6e, maxtext-22b with 1,024 tokens on v4 and v6e), unless scores are much
    # larger (`account.LEAD`).
    mlp_again_first: bool = False
    # There the gradient of scores is written for each product that reads it, where two cores share
    # a product (ViT-22B and maxtext-22b on v4 and v5p; not on v5e and v6e). Under a mask it is so
    # elsewhere: the first one does not take the place of what it is made of (llama2-13b, mistral-7b
    # and qwen3-14b on v5p, olmo2-7b and maxtext-32b on v4; not without one: vit-h-14, mae-l-16).
    scores_twice: float = 0.0
    # Gradients of rotated queries and keys are in float32, in which they are turned back, where
    # products of attention run apart (maxtext-16b on v4, v5e and v6e, maxtext-22b on v4, with rings
    # over the sequence and without).
    turned_wide: bool = False
    # In rings over embed of a parallel block, those back run before scores are made again
    # (maxtext-16b with axes of 4 on v6e and 8 on v5e, ViT-22B with 4 on v5p).
    scores_late: bool = False
    # What a head that pools by attention reads waits for its gradients of weights, which come while
    # the last layer runs back; where all devices split weights, more of these than of a layer are
    # whole meanwhile (ViT-22B, the same programs).
    pooled_waits: bool = False
    # Whole vocabulary tables, or their gradients, that stay while layers run: the same programs.
    tables: float = 0.0
    # Without prefetching, the gradient of a head with a table of its own is scattered before layers
    # run back (llama2-7b and llama2-70b on v5p; not in MaxText's programs).
    tables_leave: bool = False
    # Whole gradients of vocabulary tables are in float32 where the partitioner writes collectives:
    # palm-8b on v4, maxtext-16b on v5e, llama3-8b on v6e, each with all shards.
    wide_tables: bool = False
    # The head's gradients of weights are computed after the layers, so that what they multiply
    # waits. "tensor": with a tensor axis, and on chips whose SparseCores move what is gathered
    # (tpu7x; without prefetching too: llama3-8b and llama3-70b), pooled heads only without rings
    # (six programs with logits, three without), and where other stacks run back after the head's
    # (t5-xxl on v4, cappa-b-16 on v5e). At once where neither rings run nor gathers overlap, which
    # then hide nothing (gemma2-2b and qwen3-14b on v5e, llama3-8b on v5p, palm-8b on v4).
    # "synchronous": so too, and where gathers are synchronous and nothing is offloaded: the
    # scheduler that hides latencies computes them at once (llama2-70b on v5p with and without its
    # flags, llama2-7b on v5p, with qkv offloaded and on v5e, llama3-70b on v6e). They are computed
    # at once where attention is unfused (llama2-7b, llama3-8b, maxtext-22b), or where the head is
    # the fullest moment anyway (llama3-8b on v6e, with and without flags; libtpu 0.0.52).
    head_late: str = ""
    # Also where rings run: on one core whose matrix unit is 128 wide (maxtext-16b on v5e with axes
    # of 4 and 8, over embed and the sequence), and beside SparseCores. On v4, v5p and v6e the
    # head's gradients are over when layers begin (llama2-7b and llama2-70b with axes of 4, 8 and
    # 16, maxtext-22b with 4 and 8, maxtext-16b on v6e; not with two tensor axes of llama2-70b).
    head_late_in_rings: bool = False
    # Keys, values and what attention gives stay from their first reader to their last, backward, as
    # they must; MaxText's compiled programs hold less than this and all else here together.
    stays: bool = True
    # The projection that a gate multiplies is computed again in one operation with the product and
    # its gradients, and not written (llama2-7b and llama2-70b on v5p, llama3-8b on v6e, palm-8b).
    gates_fused: bool = False
    # The gradient of a gated MLP's hidden layer comes before both projections are made again, where
    # the MLP stands behind attention and no ring runs: the last matrix is not needed beside the
    # others (llama2-70b on v5p without prefetching, with a context axis and left to the
    # partitioner, llama2-7b on v5p, both with a tensor axis without overlap).
    hidden_first: bool = False
    # Logits, and their gradient, in the compute format: every program of MaxText's.
    narrow_logits: bool = False
    # Left to the partitioner, with rings, the gradient of logits that waits is written in the
    # compute format where the head has a table of its own (llama2-7b on v5p, llama3-8b and
    # llama3-70b on tpu7x; not llama2-70b on v5p), else made in the product that reads it
    # (maxtext-16b on v5e and v6e).
    logits_apart: bool = False
    # A product's gradient by its weight comes before that by its operand, which may take the place
    # of what is not read again: the hidden layer, where the activation (relu) leaves signs alone
    # (maxtext-16b, 64b and 22b).
    weights_first: bool = False
    # A layer's weight that its backward pass reads twice is gathered for each, where that leaves no
    # room otherwise (gpt3-175b on v6e: 900 GB of gathers where two passes take 696). Such programs
    # also take gradients by operands first (maxtext-128b on v5e, llama3-70b on v6e).
    gathers_again: bool = False
    # That of the head comes after it, so that the whole table and its whole gradient are never
    # there together: llama3-8b on v6e and palm-8b on v4, with all and with 32 shards; of MaxText's
    # programs the leanest may (gemma3-12b ran on v6e).
    head_last: str = ""  # of the "head", or of "all" products
    # It comes before it where the table is the embedding's and rounds are of several layers, unless
    # shards are no whole tiles and travel cut into lanes: gemma2-9b with batch and fsdp axes on v5e
    # and on v6e, gemma2-2b on v4, v5e and v5p (also in two microbatches), gemma3-4b on v4 and over
    # 256 chips of v5e, whose vocabulary is no multiple of lanes. Not gemma2-9b and gemma2-2b over
    # 256 chips of v5e; nor gpt-oss-20b, whose table is the head's own.
    tables_together: bool = False
    # Gathered matrices are whole tiles of HBM (`trace.Size.pieces`).
    tiles: bool = False
    # The same of softmax's values, in HBM where attention is not fused; None: the compute format.
    # Float32 arrays of all query-key pairs wait for their gradient in ViT-22B and maxtext-16b.
    scores_bytes: float | None = None
    # Float32 numbers that a fused attention kernel keeps of each row: a whole vector register
    # (`splash_mha_fwd_residuals` in llama2-70b and llama3).
    lanes: float = 128.0
    # One of them is taken at once where gathers are asynchronous: no such array is among the
    # largest of llama2-13b's two, of llama2-7b's and maxtext-16b's programs on v5e; in eleven
    # on v5p and v6e, whose gathers are synchronous, it is.
    lanes_taken: bool = False
    # Without a ring, what was gathered over a tensor axis is laid out once more for the gradient
    # of a weight: tensor plans without overlap of ViT-22B (v4, v5p, v6e) and maxtext-16b; not of
    # the head's (llama3-8b on v5p and palm-8b on v4, without prefetching too).
    whole_copies: bool = False
    # So too where a gated MLP stands behind attention: beside SparseCores (llama3-8b and llama3-70b
    # on tpu7x), and not on v5p (llama2-7b, llama2-70b, llama3-8b).
    gated_copies: bool = False
    # Rings. What one has beside its results stays until the next ring ends: both rings of a
    # branch's backward pass run side by side (every ring of the list above).
    ring_waits: bool = False
    # The array in which a gated MLP's block puts together the gradient that attention's ring will
    # gather is there while the MLP's rings run (llama2-7b and llama2-70b on v5p with axes of 4, 8
    # and 16, over embed and the sequence). Over the sequence so is all that rings put together.
    ring_ahead: bool = False
    # Gradients of weights wait for the rings of the next products back, with what they multiply
    # (llama2-7b and llama2-70b on v5p with axes of 8 and 16, maxtext-16b on v6e with 4 and 8), over
    # embed unless biases, which read the gradients' pieces, come with them (ViT-22B, vit-bigg).
    ring_weights_wait: bool = False
    # Float32 summands of each whole result in a ring over embed. Of more than `trace.FEW` members
    # one product is made apart and added in the end of the next, of both rings at once where these
    # run side by side (with axes of 8 ViT-22B on v4 and v5p, vit-bigg on v5e, vit-h-14 and
    # maxtext-22b on v4, llama2-7b and llama2-70b on v5p; logits of palm-8b and gemma2-9b).
    ring_sums: float = 1.0
    # There is one of every other member: where the matrix unit is 256 wide, no product is added to
    # a sum as it is made (vit-22b, llama3-8b and maxtext-16b on v6e, llama3-70b on tpu7x). In a
    # ring over the sequence the summands of the product before are there beside (llama3-8b and
    # llama3-70b on tpu7x and maxtext-16b on v6e, with eight members).
    ring_apart: bool = False
    ring_copies: float = 0.0  # of each result, beside it, in a ring over the sequence
    # All summands of a ring that scatters are made, in float32, before the first one leaves: four
    # in rings of 4, eight in the ring of 8 (ViT-22B, maxtext-16b).
    ring_results: float = 0.0
    # Pieces of each product's result, in the compute format, that a windowed einsum has beside the
    # sum: in either direction one that comes and one that is made, until all products that add to
    # the sum are done (maxtext-32b and llama2-7b with a tensor axis of 4; maxtext-1024b and
    # mistral-7b agree).
    ring_pieces: float = 0.0
    # Pieces of the sum that each of several such products sends on, as the last of them is made:
    # one operation adds what has come to all, in either direction (eight pieces of four products of
    # ViT-22B on v4 and v5p and of maxtext-22b on v4, four of two of llama2-7b on v5p, with a tensor
    # axis of 4; MaxText's llama2-7b and llama3-70b on v5p agree). Not where the matrix unit is 256
    # wide (vit-22b on v6e, llama3-8b and llama3-70b on tpu7x).
    ring_leaving: float = 0.0
    # Whole arrays are put together in empty ones, and those were moved out of the loop. In a ring
    # over embed, whatever this says, one of each array that it gathers, forward and back: two of a
    # parallel block (ViT-22B, maxtext-16b), four of a serial one (llama2-7b, llama2-70b, vit-h-14,
    # vit-bigg). Over the sequence "few": one of the stream and one of each projection
    # that attention reads; "every": one of each array that a product gathers and of each of its
    # results, forward and backward (maxtext-22b and palm-8b on v4, llama2-70b on v5p, ViT-22B on
    # v4, v5p and v6e, vit-bigg on v5e with axes of 4 and 8), and those of the layer that is peeled
    # off the loop are there from its start; not where HBM is scarce (maxtext-16b on v5e), nor
    # beside SparseCores (llama3-8b and llama3-70b on tpu7x). Rounds of several layers make them in
    # each (gemma2-9b on v5e and v5p, gemma2-2b on v5p, gemma3-12b on v4).
    ring_empty: str = ""
    # Rings over the sequence, by rows, put together what they gather for gradients of weights when
    # nothing but these is left, all at once, where permutes wait (vit-bigg on v5e with axes of 4
    # and 8, maxtext-16b on v5e; llama3-70b on tpu7x with an axis of 8 too, not with 4).
    places_last: bool = False
    # Keys that pass round the context axis are attended to in the kernel, piece by piece.
    pieces_in_kernel: bool = False
    # Of optimizer state that lies in the host's memory, what is fetched while layers run back: of
    # llama2-7b two thirds, of llama3-70b, which leaves no room, an eighth.
    fetched: float = 0.0
    # Where layers' inputs lie in the host's memory and what attention adds to the stream is kept,
    # here or there, the stacks of both are brought back whole before the first layer runs back
    # (llama3.1-8b on v6e with and without flags for SparseCores, and with that kept on the device,
    # on v5e and on v5p; not where inputs and projections alone lie there, as of it and of
    # llama3.1-70b on v6e; libtpu 0.0.52, and not 0.0.46).
    brings_back: bool = False
    # What the next layer back finds in the host's memory is fetched while one runs: beside this
    # layer's own there is as much again (ViT-22B on v4 with queries, keys and values there, and
    # with hidden layers).
    ahead_from_host: bool = False
    # SparseCores sum over devices with a share of the array beside it in HBM: one part of as many
    # as there are members. No buffer is assigned for it, and none counts at the peak, but without
    # room for it the program is refused (llama3-70b on tpu7x with two tensor axes, and sums alone
    # of 8 to 31 GiB over 2 and 4 members; not on v5p).
    sums_beside: bool = False
    # All that a layer's gradient needs is there at once (`program/at_once.py`).
    at_once: bool = False
    # Where that would fill more than `share` of HBM the compiler does as `scarce` says, and with
    # `recomputes`, if nothing is marked for remat, drops by itself what layers keep (reported of a
    # GPT of 12 layers on v3). In a loop over layers, as emitted code has, it cannot.
    scarce: Passes | None = None
    # Where weights are gathered, the other way to spend little: the leaner of both is taken.
    scarcer: Passes | None = None
    share: float = 1.0
    recomputes: bool = False
    # Beside what is in use there are gaps between buffers, also where memory is scarce: 1.4 % in
    # the median of the 19 emitted steps that reserve more than 80 % of HBM (3.2 % of all 164 whose
    # buffers were assigned). They decide whether a plan fits.
    tight: float = 0.0
    # The scheduler of the TPU compiler runs collectives beside operations only while what is live
    # stays below a share of HBM. Three programs of llama3-70b on v5p with 94 % in use hid nothing,
    # three with up to 91 % what they could; with `xla_tpu_scheduler_percent_shared_memory_limit` at
    # 100 one of the three hid its gathers again, and at 85 one of the others none (libtpu 0.0.42).
    hides_up_to: float = np.inf
    # What is held where the partitioner writes the collectives.
    partitioned: Passes | None = None
    # What it may hold at most where memory is plentiful; reserved are up to `gaps` more, which lie
    # between buffers (0 to 11 % in MaxText's programs).
    lavish: Passes | None = None
    gaps: float = 0.11

    @property
    def least(self) -> Passes:
        """What is done where memory is scarce."""
        return self.scarce or self

    @property
    def most(self) -> Passes:
        """What is held at most where memory is plentiful."""
        return self.lavish or self


# What an implementation holds in HBM beyond the plan.
_EMITTED_SCARCE = Passes(
    gates_fused=True,
    hidden_first=True,
    pieces_in_kernel=True,
    ahead_from_host=True,
    attends_first=True,
    mlp_again_first=True,
    turned_wide=True,
    scores_late=True,
    pooled_waits=True,
    gathers_ahead=1,
    gradients_waiting=0,
    cast_ahead=True,
    tables=1.0,
    tables_leave=True,
    head_last="head",
    scores_bytes=4.0,
    ring_copies=1.0,
    ring_results=0.5,
    ring_empty="few",
    tight=0.014,
    hides_up_to=0.92,
)
# MaxText's programs.
_TRAINER = Passes(
    layers_outermost=False,
    cast_ungathered=False,
    stays=False,
    narrow_gradients=False,
    cast_ahead=True,
    tables=1.0,
    head_late="synchronous",
    narrow_logits=True,
    weights_first=True,
    tiles=True,
    ring_sums=0.0,
    ring_pieces=4.0,
    ring_leaving=2.0,
    fetched=1.0,
    brings_back=True,
    lanes_taken=True,
)
_TRAINER_SCARCE = replace(
    _TRAINER, gathers_ahead=0, lanes=1.0, fetched=0.0, tiles=False, head_last="all"
)
_EMITTED = replace(
    _EMITTED_SCARCE,
    head_late="tensor",
    places_last=True,
    gathers_ahead=2,
    gradients_waiting=2,
    whole_copies=True,
    tables_together=True,
    mlp_waits=True,
    ring_waits=True,
    ring_results=1.0,
    ring_empty="every",
    scarce=_EMITTED_SCARCE,
    share=0.9,
)


def _left_to_the_partitioner(passes: Passes) -> Passes:
    """Return what an emitted program holds whose collectives XLA writes, as it does MaxText's.

    Gradients lie in float32, those of layers in the stacks of maxtext-22b, palm-8b and maxtext-16b,
    and a tensor axis has windowed einsums, none of the rings that are emitted.
    """
    return replace(
        passes,
        narrow_gradients=False,
        wide_tables=True,
        tiles=_TRAINER.tiles,
        ring_sums=_TRAINER.ring_sums,
        ring_copies=_TRAINER.ring_copies,
        ring_results=_TRAINER.ring_results,
        ring_pieces=_TRAINER.ring_pieces,
        ring_leaving=_TRAINER.ring_leaving,
        ring_waits=False,
        scores_late=False,
        ring_empty="",
        scarce=passes.scarce and _left_to_the_partitioner(passes.scarce),
    )


# What the plan needs, in the order of emitted programs; gates are made in the ends of products.
_IDEAL = Passes(
    gates_fused=True,
    hidden_first=True,
    attends_first=True,
    head_last="head",
    pieces_in_kernel=True,
)
HOLDS: Mapping[str, Passes] = {
    "ideal": replace(_IDEAL, scarce=_IDEAL, recomputes=True),
    "emitted": replace(_EMITTED, partitioned=_left_to_the_partitioner(_EMITTED)),
    "trainer": replace(
        _TRAINER,
        scarce=replace(
            _TRAINER_SCARCE,
            scarcer=replace(_TRAINER_SCARCE, gathers_again=True, weights_first=False),
        ),
        recomputes=True,
        lavish=replace(_TRAINER, gathers_ahead=2, gradients_waiting=1),
    ),
}
# XLA on GPUs, whose kernels keep one number of each row.
_GPU = Passes(lanes=1.0, narrow_gradients=False, narrow_kept=False)
_IDEAL_GPU = replace(
    _IDEAL,
    pieces_in_kernel=False,
    lanes=1.0,
    hidden_first=False,
    stays=False,
    narrow_logits=True,
    weights_first=True,
    ring_sums=0.0,
    keeps_operands=True,
    adds_in_place=True,
)
ON_GPU: Mapping[str, Passes] = {
    # The least of what XLA's and PyTorch's steps hold.
    "ideal": replace(_IDEAL_GPU, scarce=_IDEAL_GPU, recomputes=True),
    "emitted": replace(_GPU, at_once=True),
    # A library's step is PyTorch's, which recomputes nothing that nobody asked for.
    **dict.fromkeys(
        ("trainer", "combined-1f1b", "torchtitan"),
        replace(
            HOLDS["trainer"],
            scarce=None,
            recomputes=False,
            lavish=None,
            keeps_operands=True,
            adds_in_place=True,
        ),
    ),
}


# The widest matrix unit that adds products to a sum as it makes them (`Passes.ring_apart`).
ADDS_UP_TO = 128


def held_by(implementation: str, chip: Chip) -> Passes:
    """Return what an implementation holds on a chip.

    Raises `PlanError` for an unknown one.
    """
    known = {**HOLDS, **(ON_GPU if chip.kind == "gpu" else {})}
    if implementation not in known:
        there = "" if implementation not in ON_GPU else f" on {chip.name}, only on GPUs"
        near = there or nearest(implementation, known)
        raise PlanError(f"as: '{implementation}' is not possible{near}")
    if chip.kind == "gpu":
        return known[implementation]
    found = HOLDS[implementation]
    if found.ring_empty and chip.offloads_collectives:
        found = replace(found, ring_empty="few")
    if chip.mxu_dim > ADDS_UP_TO:
        found = _everywhere(found, lambda one: replace(one, ring_leaving=0.0))
    if implementation != "emitted":
        return found
    if chip.mxu_dim > ADDS_UP_TO:  # not where the partitioner writes rings
        scarce = found.scarce and replace(found.scarce, ring_apart=True)
        found = replace(found, ring_apart=True, scarce=scarce)
    twice = chip.cores_per_chip > chip.devices_per_chip
    copied = not twice and chip.mxu_dim <= ADDS_UP_TO
    if copied:  # not where the partitioner writes rings
        found = replace(found, head_late_in_rings=True)
    if chip.offloads_collectives:
        found = _everywhere(found, lambda one: replace(one, sums_beside=True, gated_copies=True))
    else:
        found = replace(found, ring_ahead=True, ring_weights_wait=True)
    return _everywhere(found, lambda one: replace(one, scores_twice=1.0 * twice))


def _everywhere(passes: Passes, change: Callable[[Passes], Passes]) -> Passes:
    """Return passes changed, also where memory is scarce and where the partitioner writes."""
    return replace(
        change(passes),
        scarce=passes.scarce and _everywhere(passes.scarce, change),
        scarcer=passes.scarcer and _everywhere(passes.scarcer, change),
        lavish=passes.lavish and _everywhere(passes.lavish, change),
        partitioned=passes.partitioned and _everywhere(passes.partitioned, change),
    )
