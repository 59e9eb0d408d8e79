"""How a context axis attends: what it sends, what each member does, and what it holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from building import CONTEXTS, build, contends, decoder, is_legal, vit
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.errors import PlanError
from shardsim.model import Experts, Latent
from shardsim.ops.attend_blocks import KEYS_AT_ONCE
from shardsim.ops.attend_mask import Mask
from shardsim.plan import Overlap, Plan, dump_plan, load_plan, resolve
from shardsim.plan.legality import check
from shardsim.plan.plan import CONTEXT_KEYS, Context
from shardsim.plan.words import techniques
from shardsim.program.holds import HOLDS
from shardsim.program.liveness import Mode, layer_trace
from shardsim.program.overlap import overlap
from shardsim.program.partition import partition
from shardsim.program.passes import implemented
from shardsim.program.schedule import Move, every
from shardsim.program.shapes import Workload
from shardsim.program.sizes import Sizes, kind_of
from shardsim.program.tasks import Compute
from shardsim.program.trace import Measure
from shardsim.simulate import simulate_plan

TOKENS, BATCH, HEADS, DEPTH = 8192, 4, 16, 64
RING, STRIPED = (Context(keys="ring", order=order) for order in ("contiguous", "striped"))
ULYSSES = Context(keys="ulysses")

DATA = {"x": 2, "y": 2}
SLICES = {
    2: ("v4:2x2x2", {"data": DATA, "context": {"z": 2}}),
    4: ("v4:2x2x4", {"data": DATA, "context": {"z": 4}}),
    8: ("v5e:4x8", {"data": {"x": 4}, "context": {"y": 8}}),
}


def plan_of(
    members: int,
    context: Context,
    kv_heads: int = HEADS,
    causal: bool = True,
    tokens: int = TOKENS,
    **options: object,
) -> Plan:
    """Return a layer whose only axes are context and four-way data, the kernel's result kept."""
    model = decoder(layers=1, kv_heads=kv_heads, sequence=tokens, causal=causal)
    options = {"remat": "save_context"} | options
    machine, where = SLICES[members]
    return build(model, machine, 4 * BATCH, where, context=context, **options)


def moved_bytes(plan: Plan, kinds: tuple[str, ...]) -> float:
    """Return what one device sends over the context axis alone, in collectives of some kinds."""
    return sum(
        use.bytes_per_chip
        for use in predict(plan).collectives
        if use.mesh_axes == ("c",) and use.kind in kinds
    )


@pytest.mark.parametrize(("members", "kv_heads"), [*product((2, 4, 8), (1, 2, 4, 16))])
def test_bytes_are_those_of_the_papers(members: int, kv_heads: int) -> None:
    head = BATCH * TOKENS / members * DEPTH * 2.0  # a head of a member's tokens, in bf16
    # Keys and values forward, again for the backward pass, and their gradients.
    ring = 3 * (members - 1) * 2 * kv_heads * head
    assert moved_bytes(plan_of(members, RING, kv_heads), ("permute",)) == pytest.approx(ring)
    whole = moved_bytes(plan_of(members, Context(), kv_heads), ("all-gather", "reduce-scatter"))
    assert whole == pytest.approx(ring)
    # The same of queries and result, with as many key-value heads as there are members at least.
    each = 2 * HEADS + 2 * max(kv_heads, members)
    ulysses = 3 * each * head * (members - 1) / members
    assert moved_bytes(plan_of(members, ULYSSES, kv_heads), ("all-to-all",)) == pytest.approx(
        ulysses
    )


def schedule_of(plan: Plan):
    layout = resolve(plan)
    return overlap(partition(Workload.of(plan), layout), layout)


@pytest.mark.parametrize(
    ("members", "context"), [*product((2, 4, 8), (c for c in CONTEXTS if c.keys == "ring"))]
)
def test_a_ring_has_a_block_for_each_member_and_hops_between(members, context) -> None:
    plan = plan_of(members, context)
    whole = schedule_of(plan_of(members, Context()))
    for name, ways in (("layer forward", 1), ("layer backward", 2)):
        tasks = [*every(schedule_of(plan).block(name).tasks)]
        hops = [(task, times) for task, times, _ in tasks if isinstance(task, Move) and task.ways]
        arrays = sum(float(task.messages * times) for task, times in hops)
        assert arrays == 2 * ways * (members - 1)
        assert all(task.kind == "permute" and task.role == "context" for task, _ in hops)
        blocks = [(t, n) for t, n, _ in tasks if t.kind == "attention" and np.any(t.count)]
        assert sum(float(times) for _, times in blocks) == members
        done = sum(float(task.flops * times) for task, times in blocks)
        (kernel,) = (task for task in whole.block(name).computes() if task.kind == "attention")
        share = kernel.last_fraction if context.order == "contiguous" else kernel.fraction
        assert done == pytest.approx(float(kernel.flops / kernel.fraction * share))
        vector = sum(float(task.vector_ops * times) for task, times in blocks)
        assert vector == pytest.approx(float(kernel.vector_ops / kernel.fraction * share))


@pytest.mark.parametrize("tokens", [512, 1024, 4096])
def test_a_block_is_never_more_than_whole_however_short(tokens: int) -> None:
    model, (machine, where) = decoder(layers=1, sequence=tokens), SLICES[4]
    for context, most in ((RING, 1.0), (STRIPED, 0.5)):
        plan = build(model, machine, 16, where, context=context, remat="save_context")
        (own, *others) = (
            float(task.fraction)
            for task in schedule_of(plan).block("layer forward").computes()
            if task.kind == "attention" and np.any(task.count)
        )
        assert 0.5 < own <= 1.0
        assert others == pytest.approx([most] * len(others))


def attention_of(plan: Plan, name: str, implementation: str) -> Compute:
    """Return attention, or its gradient, before a ring cuts it."""
    layout = resolve(plan)
    written = partition(Workload.of(plan), layout)
    program = implemented(written, implementation, plan.machine, layout)
    (found,) = (task for task in program.block(name).computes() if task.kind == "attention")
    assert isinstance(found, Compute)
    return found


@pytest.mark.parametrize(("members", "kv_heads"), [(2, 16), (4, 16), (8, 4)])
def test_a_block_reads_its_queries_and_adds_to_float32_sums(members: int, kv_heads: int) -> None:
    plan = plan_of(members, RING, kv_heads)
    queries = BATCH * TOKENS / members * HEADS * DEPTH
    keys = 2 * BATCH * TOKENS * kv_heads * DEPTH
    sums = (members - 1) * queries * (4 + 4)
    forward = attention_of(plan, "layer forward", "ideal")
    assert forward.hbm_bytes == pytest.approx(2 * (members * queries + keys + queries) + sums)
    # The gradient of the result as often as the queries, the result once; of keys and values what
    # is made, and sums that arrive and leave.
    backward = attention_of(plan, "layer backward", "ideal")
    read = 2 * members * queries + keys + queries
    assert backward.hbm_bytes == pytest.approx(2 * (read + queries + 3 * keys) + sums)
    # One member passes nothing round.
    alone = plan_of(members, Context(), kv_heads)
    whole = attention_of(alone, "layer forward", "ideal")
    assert whole.hbm_bytes == pytest.approx(2 * (2 * queries + keys))


@pytest.mark.parametrize("members", [2, 4, 8])
def test_without_whole_tiles_the_emitted_ring_has_its_scores_in_hbm(members) -> None:
    tokens = members * 1040  # parts of 520 and 1,040 tokens
    for context, share in ((RING, 1.0), (STRIPED, (1 + 1 / members) / 2)):
        plan = plan_of(members, context, tokens=tokens)
        for name, passes in (("layer forward", 12), ("layer backward", 26)):
            ideal, emitted = (attention_of(plan, name, how) for how in ("ideal", "emitted"))
            assert float(emitted.fraction) == pytest.approx(share)
            assert float(emitted.own_fraction) == 1.0
            assert emitted.matmuls == ideal.matmuls  # one loop, not two kernels
            scores = BATCH * HEADS * tokens**2 / members * share
            assert emitted.hbm_bytes - ideal.hbm_bytes == pytest.approx(passes * scores)
            assert emitted.vector_ops / ideal.vector_ops == pytest.approx(share / ideal.fraction)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_in_whole_tiles_the_emitted_ring_runs_the_kernel_for_each_piece(members) -> None:
    for context in (RING, STRIPED):
        plan = plan_of(members, context)
        for name, more in (("layer forward", 0), ("layer backward", 2)):
            ideal, emitted = (attention_of(plan, name, how) for how in ("ideal", "emitted"))
            assert float(emitted.fraction) == pytest.approx(float(ideal.fraction))
            one = TOKENS // members // (1 + (context is STRIPED)) <= 512  # block: one kernel
            assert emitted.matmuls - ideal.matmuls == more * (not one)  # of a gradient
            scores = BATCH * HEADS * TOKENS**2 / members * float(ideal.fraction)
            assert emitted.hbm_bytes < 12 * scores
            # The kernel's results are added to sums, each read and written in float32.
            layout = resolve(plan)
            program = implemented(
                partition(Workload.of(plan), layout), "emitted", plan.machine, layout
            )
            added = [t for t in program.block(name).computes() if t.name.startswith("pieces of")]
            # Heads of 64 fill half of the lanes.
            element = BATCH * TOKENS / members * HEADS * 2 * DEPTH
            assert sum(float(task.hbm_bytes) for task in added) > (members - 1) * 10 * element
            # They are added behind each piece, beside the hop that brings the next.
            tasks = every(overlap(program, layout).block(name).tasks)
            behind = [(task, float(n)) for task, n, _ in tasks if task.name.startswith("pieces of")]
            assert sum(n for _, n in behind) == members
            moved = sum(float(task.hbm_bytes) * n for task, n in behind)
            assert moved == pytest.approx(sum(float(task.hbm_bytes) for task in added))


def pairs(mask: Mask, queries: range, keys: range) -> float:
    """Return the pairs that a kernel computes: of blocks of 512 those that are not empty."""
    count = 0
    for first in range(queries.start, queries.stop, 512):
        for key in range(keys.start, keys.stop, 512):
            seen = not mask.causal or key <= first
            if mask.window:
                seen &= key + 511 > first - mask.window
            count += seen
    return count * 512.0**2


@pytest.mark.parametrize("members", [2, 4, 8])
def test_of_a_causal_mask_the_last_member_has_most_and_striped_members_have_half(members) -> None:
    mask, part = Mask(causal=True), TOKENS // members

    def tokens(member: int, striped: bool) -> list[range]:
        if not striped:
            return [range(member * part, (member + 1) * part)]
        half = part // 2
        starts = member * half, (2 * members - 1 - member) * half
        return [range(start, start + half) for start in starts]

    def work(queries: int, keys: int, striped: bool) -> float:
        both = product(tokens(queries, striped), tokens(keys, striped))
        return sum(pairs(mask, mine, theirs) for mine, theirs in both) / part**2

    for striped in (False, True):
        each = [[work(q, k, striped) for k in range(members)] for q in range(members)]
        totals = [sum(row) for row in each]
        own = [each[member][member] for member in range(members)]
        assert own == pytest.approx([float(mask.own(part, striped))] * members)
        if striped:
            assert totals == pytest.approx([members * mask.computed(TOKENS)] * members)
            others = {each[q][k] for q, k in product(range(members), repeat=2) if q != k}
            assert others == {0.5}
        else:
            assert totals == sorted(totals)
            assert totals[-1] == pytest.approx(members * float(mask.computed(TOKENS, part)))


@given(
    st.sampled_from(CONTEXT_KEYS[:2]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
    st.sampled_from(["physical", "calibrated"]),
    st.sampled_from([1024, 2048, 4096, 16384]),
)
@settings(max_examples=40, deadline=None)
def test_striped_tokens_are_never_slower(keys, members, kv_heads, causal, costs, tokens) -> None:
    model = decoder(layers=1, kv_heads=kv_heads, sequence=tokens * members // 4, causal=causal)
    if model.sequence // members % 256:
        return  # parts that are no whole tiles of the kernel
    machine, where = SLICES[members]
    contiguous, striped = (
        predict(
            build(model, machine, 8, where, context=Context(keys=keys, order=order)), costs=costs
        )
        for order in ("contiguous", "striped")
    )
    # In a ring halves of queries and keys are chosen, which short pieces do not make up for.
    more = 0.06 if keys == "ring" and causal and costs == "calibrated" else 1e-12
    assert striped.step_time_s <= contiguous.step_time_s * (1 + more)
    if not causal:
        assert striped.step_time_s == pytest.approx(contiguous.step_time_s, rel=1e-12)
    assert striped.hbm["peak_bytes"] == contiguous.hbm["peak_bytes"]


def test_a_ring_is_never_slower_for_overlapping() -> None:
    for members in (2, 4, 8):
        for context in (RING, STRIPED):
            slow, fast = (
                predict(plan_of(members, replace(context, overlap=on))) for on in (False, True)
            )
            assert fast.step_time_s < slow.step_time_s
            assert fast.time["exposed_comm_s"] < slow.time["exposed_comm_s"]


@pytest.mark.parametrize("members", [2, 4, 8])
def test_a_ring_holds_two_pieces_and_no_whole_keys(members: int) -> None:
    def live(context: Context) -> dict[str, float]:
        plan = plan_of(members, context)
        layout, work = resolve(plan), Workload.of(plan)
        kind = kind_of(work.model, layout)
        passes = replace(HOLDS["ideal"], pieces_in_kernel=False)
        kept = plan.remat.groups[0].kept
        trace = layer_trace(work.model, work.attention, 0, kind, kept, passes, Mode())
        measure = Measure(Sizes(work, layout), 2.0, 2.0)
        return {array.name: float(measure(array.size)) * array.times for array in trace.arrays}

    piece = BATCH * TOKENS / members * HEADS * DEPTH * 2.0
    gathered, ring, ulysses = live(Context()), live(RING), live(ULYSSES)
    for name in ("k turned", "v"):
        assert gathered[f"{name}, whole"] == members * piece
        assert f"{name}, whole" not in ring
        assert ring[f"{name}, coming round"] == 2 * piece
        assert ring[f"d {name}, coming round"] == 2 * piece
        assert ulysses[f"{name}, whole"] == piece
    # Without a kernel there are the scores of a block of keys, in float32 and rounded.
    scores = BATCH * TOKENS / members * HEADS * KEYS_AT_ONCE * (4.0 + 2.0)
    assert ring["q turned, scores"] == scores
    peaks = [predict(plan_of(members, one)).hbm["peak_bytes"] for one in (Context(), RING)]
    assert members <= 4 or peaks[1] < peaks[0] + scores


@pytest.mark.parametrize(("context", "costs"), [*product(CONTEXTS, ["physical", "calibrated"])])
def test_events_agree_with_the_closed_form(context: Context, costs: str) -> None:
    plan = plan_of(4, context, overlap=Overlap(weights=False, gradients=False))
    found = simulate_plan(plan, costs=costs)
    assert not contends(found.schedule, resolve(plan))
    assert found.step_time_s == pytest.approx(found.events.analytic_step_time_s, rel=0.005)


SIZES = st.sampled_from([1, 2, 4])


@given(st.sampled_from([2, 6, 8, 12, 16]), st.sampled_from([1, 2, 3, 4, 6]), SIZES, SIZES, SIZES)
@settings(max_examples=60, deadline=None)
def test_ulysses_is_legal_where_heads_divide(heads, shared, tensor, tensor2, context) -> None:
    if heads % shared:
        return
    kv_heads = heads // shared
    model = decoder(heads=heads, kv_heads=kv_heads, head_dim=64, embed=1536, mlp=6144)
    taken = {"tensor": ("x", tensor), "tensor2": ("y", tensor2), "context": ("z", context)}
    where = {role: {axis: size} for role, (axis, size) in taken.items()}
    where["data"] = {axis: 4 // size for axis, size in taken.values()}
    plans = [build(model, "v4:4x4x4", 64, where, context=one) for one in (Context(), ULYSSES)]
    left = kv_heads // min(tensor, kv_heads)
    split = min(tensor, kv_heads) * min(tensor2, left)
    over = min(context, kv_heads // split)  # members with key-value heads of their own
    divides = context == 1 or kv_heads % (split * over) == context % over == 0
    divides &= heads % (tensor * tensor2 * context) == 0
    assert is_legal(plans[1]) == (is_legal(plans[0]) and divides)


@pytest.mark.parametrize(
    ("kv_heads", "heads", "words"),
    [
        (6, 6, r"attention heads over .* the context axis of ulysses: 6 does not divide by 4"),
        (6, 12, r"key-value heads over .* the context axis of ulysses: 6 does not divide by 4"),
        (3, 12, r"the context axis of ulysses over the key-value heads of a device: 4 .* by 3"),
    ],
)
def test_the_message_says_what_does_not_divide(kv_heads: int, heads: int, words: str) -> None:
    model = decoder(heads=heads, kv_heads=kv_heads, head_dim=64)
    plan = build(model, SLICES[4][0], 4, SLICES[4][1], context=ULYSSES)
    with pytest.raises(PlanError, match=words):
        check(plan, resolve(plan))


def test_striped_parts_divide_the_sequence() -> None:
    model = decoder(sequence=516)
    machine, where = SLICES[4]
    assert is_legal(build(model, machine, 4, where))
    assert not is_legal(build(model, machine, 4, where, context=Context(order="striped")))


@pytest.mark.parametrize(("group", "whole"), [(256, True), (512, False), (0, True)])
def test_tokens_are_striped_where_that_balances_and_cuts_no_group(group: int, whole: bool) -> None:
    experts = Experts(number=8, top_k=2, mlp=512, capacity=1.0, group=group)
    model = decoder(sequence=2048, experts=experts)
    machine, where = SLICES[4]
    assert bool(resolve(build(model, machine, 4, where)).striped) == whole
    assert is_legal(build(model, machine, 4, where))
    assert is_legal(build(model, machine, 4, where, context=Context(order="striped"))) == whole
    assert not resolve(build(replace(model, causal=False), machine, 4, where)).striped
    # A part of 64 tokens is no whole tile; 256 tokens a member are, but their halves of 128 too.
    assert not resolve(build(replace(model, sequence=512, experts=None), machine, 4, where)).striped
    assert resolve(build(replace(model, sequence=1024, experts=None), machine, 4, where)).striped


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": ULYSSES, "attention": "unfused"}, "attention: flash"),
        ({"context": Context(keys="ulysses", order="striped")}, "all tokens"),
        ({"context": Context(overlap=False)}, "only a ring"),
        ({"context": RING, "execution": "partitioned"}, "execution: explicit"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        resolve(plan_of(4, **options))


@pytest.mark.parametrize("keys", ["ring", "ulysses"])
def test_latents_are_gathered(keys: str) -> None:
    latent = Latent(queries=512, keys=256, rotary=32, values=64)
    machine, where = SLICES[4]
    with pytest.raises(PlanError, match="of latent attention is not modelled; use gathered"):
        build(decoder(latent=latent, norm="rmsnorm"), machine, 4, where, context=Context(keys=keys))


def test_a_plan_without_a_context_axis_cannot_say_how_it_attends() -> None:
    with pytest.raises(PlanError, match="no mesh axis splits the sequence"):
        resolve(build(vit(), "v4:2x2x1", 4, {"data": {"x": 2, "y": 2}}, context=RING))


@pytest.mark.parametrize("context", CONTEXTS)
def test_plan_files_say_it(context: Context, tmp_path) -> None:
    plan = plan_of(4, context)
    (tmp_path / "plan.yaml").write_text(dump_plan(plan))
    assert load_plan(tmp_path / "plan.yaml") == plan
    words = {"ring": "keys pass round", "ulysses": "heads for tokens", "gathered": ""}
    assert words[context.keys] in techniques(plan)
    assert ("striped" in techniques(plan)) == (context.order == "striped")
    assert ("not overlapped" in techniques(plan)) == (not context.overlap)
    assert ("context:" in dump_plan(plan).split("remat:")[1]) == (context != Context())
