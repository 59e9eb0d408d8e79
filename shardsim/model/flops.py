"""FLOPs per token, and MFU, in each of the ways in which they have been counted and published.

A multiplication and an addition are two FLOPs. The backward pass costs twice the forward pass;
what is recomputed does not count (that is HFU). L layers, H heads of width Q, sequences of T
tokens, N weights (`Model.active_parameters`: of experts, those that a token goes to). What routing
does besides is not counted: tokens dispatched by products, places of experts that stay empty.

Of a model of several stacks each has N, L and T of its own; keys and values of cross-attention
work on the tokens that are attended to. Their sum is that of one example, and is counted per token
of the last stack. What is frozen runs forward only: 2N in place of 6N, a third of its attention.
Under adapters it has gradients of operands too, 4N; the adapters themselves have 6N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from enum import Enum
from fractions import Fraction
from functools import lru_cache

from shardsim.errors import ModelError, nearest
from shardsim.graph.arrays import Op, weights_of
from shardsim.model.blocks import graph_of
from shardsim.model.spec import Model
from shardsim.model.tensors import lengths, of_tokens

PADDED_VOCAB = 128  # Megatron-LM's make_vocab_size_divisible_by
TRAINING = 3  # forward once, backward twice as much
FORWARD = 1  # what is frozen


class Accounting(Enum):
    """How the FLOPs of a training step are counted, per token.

    SIX_N: 6N, no attention. (MaxText until 2023-06-05.)
    PALM: 6N + 12LHQT, attention in full; where a query sees a window, its tokens in place of T.
        PaLM, arXiv 2204.02311 appendix B; the project's own.
        (MaxText from 2023-06-06, commit 0e650131c.)
    PALM_CAUSAL: 6N + 6LHQT, attention halved. (MaxText from 2023-11-29, commit 64ee4e938.)
    MAXTEXT_2024: three times the forward matmuls, logits included, the look-up of embeddings
        not, attention in full. (MaxText from 2024-05-09, commit 353fb837c.)
    MAXTEXT_2025: the same, attention halved. (MaxText from 2025-07-22, commit a4c01726e.)
    MAXTEXT_MIXED: as MAXTEXT_2024, attention halved, of windows too: half as many keys as a window
        has. (MaxText of early 2025, of models with windows beside layers without.)
    MEGATRON: three times the forward matmuls, attention in full, logits of a vocabulary padded to a
        multiple of 128. (arXiv 2104.04473, appendix, without what is computed again; Megatron-LM's
        `num_floating_point_operations`, which of late halves attention too, as MAXTEXT_2025.)
    """

    SIX_N = "six_n"
    PALM = "palm"
    PALM_CAUSAL = "palm_causal"
    MAXTEXT_2024 = "maxtext_2024"
    MAXTEXT_2025 = "maxtext_2025"
    MAXTEXT_MIXED = "maxtext_mixed"
    MEGATRON = "megatron"


def accounting_named(name: str) -> Accounting:
    """Return the accounting called `name`, or raise `ModelError` with the nearest one."""
    try:
        return Accounting(name)
    except ValueError:
        names = [known.value for known in Accounting]
        raise ModelError(f"unknown accounting {name!r}{nearest(name, names)}") from None


@lru_cache(maxsize=1024)
def attention_flops_per_token(
    model: Model, sequence: int | None = None, *, halved: bool = False
) -> int:
    """Return the FLOPs of scores and weighted values, forward, all layers: 4LHQT per token.

    `halved` counts only the half of the scores that a causal mask keeps: 2LHQT.
    """
    tokens = _sequence(model, sequence)
    return (
        sum(
            _attention_flops(one, own, halved and _halves(model, one))
            for one, own in _parts(model, tokens)
        )
        // tokens
    )


def _parts(model: Model, tokens: int) -> list[tuple[Model, int]]:
    """Return the stacks of a model, each with the tokens of an example."""
    *read, _ = model.parts
    return [*((part.model, part.model.sequence) for part in read), (model, tokens)]


def _halves(model: Model, part: Model) -> bool:
    """Return whether attention of a part is halved: of one stack always, of several if masked."""
    return len(model.parts) == 1 or part.causal


def _attention_flops(part: Model, tokens: int, halved: bool) -> int:
    """Return the forward FLOPs of scores and weighted values of a part, over an example."""
    return sum(
        many * flops
        for layer, many in graph_of(part).layers
        for unit, flops in _products(part, layer.part.ops, tokens, halved)
        if unit == "attention"
    )


def _forward_flops(part: Model, tokens: int, halved: bool, training: bool = False) -> int:
    """Return the FLOPs of every product of a part's forward pass over an example; in `training`
    with those of the gradients of its operands."""
    graph = graph_of(part)
    total = 0
    for ops, many in ((graph.ends, 1), *((layer.part.ops, many) for layer, many in graph.layers)):
        for op in ops:
            for _, flops in _products(part, [op], tokens, halved):
                gradients = TRAINING - FORWARD
                if op.product:
                    gradients = sum(array.trained for array in op.ins)
                elif not op.out.trained:
                    gradients = 0
                total += many * flops * (FORWARD + gradients * training)
    return total


def _weight_flops(part: Model, tokens: int) -> int:
    """Return the FLOPs that 6N counts of a part: for each token of an example that a weight works
    on two forward, two by operand and, if it is trained, two by weight."""
    backward = 0 if part.frozen else part.own_active_parameters + part.own_trained_parameters
    total = (part.own_active_parameters + backward) * tokens
    if part.memory_tokens:
        sizes, graph = lengths(part), graph_of(part)
        read = sum(
            many * math.prod(sizes[d] for d in weight.dims)
            for ops, many in (
                (graph.before.ops, 1),
                *((layer.part.ops, many) for layer, many in graph.layers),
            )
            for weight in weights_of(ops)
            if {"memory_embed", "prompt_embed"} & {*weight.dims}
        )
        passes = TRAINING - (part.lora is not None)
        total += passes * read * (part.memory_tokens - tokens)
    return 2 * total


def forward_matmul_flops_per_token(
    model: Model, sequence: int | None = None, *, halved: bool = False
) -> float:
    """Return the FLOPs of every matmul of the forward pass, per token.

    What works once per sequence, as a pooling head does, is spread over its tokens (`sequence`, or
    the model's own). For a decoder this is MaxText's explicit count.
    """
    tokens = _sequence(model, sequence)
    return (
        sum(
            _forward_flops(one, own, halved and _halves(model, one))
            for one, own in _parts(model, tokens)
        )
        / tokens
    )


def _products(
    model: Model, ops: Iterable[Op], tokens: int, halved: bool
) -> Iterator[tuple[str, int]]:
    """Yield (unit, FLOPs) of every product of a forward pass over one sequence."""
    sizes: dict[str, int | Fraction] = dict(lengths(model))
    # Comparing an embedding with those of others is not counted: it depends on the batch.
    sizes |= {"batch": 1, "seq": tokens, "keys": tokens, "others": 0}
    sizes |= of_tokens(model, Fraction(tokens))
    if model.experts:  # of an expert's tokens what comes, not what it has room for
        share = model.experts.share(tokens)
        sizes |= {"slot": share, "place": share, "chunk": model.experts.groups(tokens)}
    for op in ops:
        if op.counts:
            dims = math.prod(sizes[d] for d in op.counts.dims)
            whole = int(2 * op.counts.times * dims)
            if op.mask:
                whole = whole * op.mask.counted(tokens, halved) // tokens**2
            yield op.counts.unit, whole
        elif op.product and op.counted:
            every = {d for array in op.arrays for d in array.dims}
            whole = int(2 * math.prod(sizes[d] for d in every))
            if op.mask:
                whole = whole * op.mask.counted(tokens, halved) // tokens**2
            yield op.unit, whole
        elif op.kernel:
            shape = op.kernel.shape
            pairs = math.prod(sizes[d] for d in {*shape.rows, *shape.columns, *shape.batch})
            widths = [sizes[d] for d in op.kernel.widths]
            inner = widths or [math.prod(sizes[d] for d in shape.inner)] * op.kernel.products
            flops = 2 * pairs * sum(inner)
            if op.kernel.mask:
                flops = flops * op.kernel.mask.counted(tokens, halved) // tokens**2
            yield op.unit, int(flops)


def model_flops_per_token(
    model: Model, sequence: int | None = None, accounting: Accounting = Accounting.PALM
) -> float:
    """Return the FLOPs of training on one token, by the given accounting.

    `sequence` is in tokens; without it the model's own counts.

    PaLM 540B: 6 * 540.36e9 + 12 * 118 * 48 * 256 * 2048 = 3.278e12.
    """
    if len(model.parts) > 1 or model.lora or model.memory_tokens:
        return _flops_of_parts(model, _sequence(model, sequence), accounting)
    if accounting is Accounting.SIX_N:
        return 6.0 * model.active_parameters
    if accounting in (Accounting.PALM, Accounting.PALM_CAUSAL):
        halved = accounting is Accounting.PALM_CAUSAL
        attention = attention_flops_per_token(model, sequence, halved=halved)
        return 6.0 * model.active_parameters + TRAINING * attention
    halved = accounting is Accounting.MAXTEXT_2025
    forward = forward_matmul_flops_per_token(model, sequence, halved=halved)
    if accounting is Accounting.MAXTEXT_MIXED:
        forward -= attention_flops_per_token(model, sequence) / 2
    if accounting is Accounting.MEGATRON and model.vocab:
        forward += 2.0 * model.embed * (-model.vocab % PADDED_VOCAB)
    return TRAINING * forward


def _flops_of_parts(model: Model, tokens: int, accounting: Accounting) -> float:
    """Return the FLOPs of training on an example of a model of several stacks, per token of the
    last one."""
    causal = accounting in (
        Accounting.PALM_CAUSAL,
        Accounting.MAXTEXT_2025,
        Accounting.MAXTEXT_MIXED,
    )
    total = 0.0
    for part, own in _parts(model, tokens):
        halved = causal and part.causal
        if accounting in (Accounting.SIX_N, Accounting.PALM, Accounting.PALM_CAUSAL):
            total += _weight_flops(part, own)
            if accounting is not Accounting.SIX_N:
                total += (FORWARD if part.frozen else TRAINING) * _attention_flops(
                    part, own, halved
                )
        else:
            total += _forward_flops(part, own, halved, training=True)
            if accounting is Accounting.MEGATRON and part is model:
                padding = 2.0 * model.embed * (-model.vocab % PADDED_VOCAB) * own
                total += (TRAINING - (model.lora is not None)) * padding
    return total / tokens


def mfu(
    model: Model,
    tokens_per_s_per_chip: float,
    peak_flops: float,
    sequence: int | None = None,
    accounting: Accounting = Accounting.PALM,
) -> float:
    """Return the model FLOPs utilisation, a fraction: FLOPs per token * tokens/s / peak FLOP/s.

    ViT-22B on v4: 1150 * (6 * 21.743e9 + 12 * 48 * 48 * 128 * 256) / 275e12 = 0.549.
    """
    _check_rates(tokens_per_s_per_chip, peak_flops)
    return model_flops_per_token(model, sequence, accounting) * tokens_per_s_per_chip / peak_flops


def tokens_per_s_at_mfu(
    model: Model,
    utilisation: float,
    peak_flops: float,
    sequence: int | None = None,
    accounting: Accounting = Accounting.PALM,
) -> float:
    """Return the tokens per second and chip at a utilisation (a fraction): `mfu` inverted.

    A published FLOP/s per chip as `peak_flops`, at a utilisation of 1, turns back into the
    throughput from which it was computed.
    """
    _check_rates(utilisation, peak_flops)
    return utilisation * peak_flops / model_flops_per_token(model, sequence, accounting)


def _sequence(model: Model, sequence: int | None) -> int:
    tokens = model.sequence if sequence is None else sequence
    if tokens < 1:
        raise ModelError(
            f"model {model.name!r}: sequence: expected 1 token or more, found {tokens}"
        )
    return tokens


def _check_rates(rate: float, peak_flops: float) -> None:
    if not rate >= 0:
        raise ModelError(f"utilisation: expected a rate of 0 or more, found {rate}")
    if not peak_flops > 0:
        raise ModelError(f"utilisation: expected a peak above 0 FLOP/s, found {peak_flops}")
