"""The operations of HLO, by what they mean for time."""

from __future__ import annotations

# Collectives, as the planner calls them.
KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "broadcast",
}
# Result and operands have the same dimensions.
UNARY = frozenset(
    "abs acos acosh asin asinh atan atanh cbrt ceil convert copy cos cosine cosh"
    " count-leading-zeros erf exponential exponential-minus-one floor imag is-finite log"
    " log-plus-one logistic negate not popcnt real reduce-precision round-nearest-afz"
    " round-nearest-even rsqrt sign sine sinh sqrt stochastic-convert tan tanh"
    " optimization-barrier".split()
)
BINARY = frozenset(
    "add and atan2 compare complex divide maximum minimum multiply or power remainder shift-left"
    " shift-right-arithmetic shift-right-logical subtract xor".split()
)
# They move no data and take no time: names, addresses, constants, numbers of the device.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast partition-id replica-id after-all"
    " add-dependency optimization-barrier domain get-dimension-size".split()
)
# They start a transfer between memories; the one that ends with -done waits for it.
MOVES = frozenset(("copy", "slice", "dynamic-slice", "dynamic-update-slice"))
TRANSFERS = frozenset(f"{name}-start" for name in MOVES)
ASYNC_DONE = frozenset(f"{name}-done" for name in (*MOVES, "async", "call", *KINDS))
OTHERS = frozenset(
    "async-start async-update batch-norm-grad batch-norm-inference batch-norm-training"
    " bitcast-convert broadcast call call-start cholesky clamp concatenate conditional"
    " convolution custom-call"
    # GPUs run some beside others.
    " fusion-start fusion-done custom-call-start custom-call-done"
    " dot dynamic-reshape dynamic-slice dynamic-update-slice fft fusion gather infeed iota map"
    " outfeed pad recv recv-done reduce reduce-window reshape reverse rng rng-bit-generator"
    " rng-get-and-update-state scatter select select-and-scatter send send-done set-dimension-size"
    " slice sort topk transpose triangular-solve while".split()
)
OPCODES = (
    UNARY
    | BINARY
    | FREE
    | TRANSFERS
    | ASYNC_DONE
    | OTHERS
    | frozenset(KINDS)
    | frozenset(f"{name}-start" for name in KINDS)
)
# Custom calls that only say something about data, or name a part of memory.
FREE_TARGETS = frozenset(
    "ConcatBitcast AllocateBuffer AssumeGatherIndicesInBound Sharding SPMDFullToShardShape"
    " SPMDShardToFullShape AsyncCollectiveStart AsyncCollectiveDone"
    " annotate_device_placement".split()
)
