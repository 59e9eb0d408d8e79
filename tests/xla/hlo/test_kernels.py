"""Splash attention kernels: FLOPs and bytes in closed form, damage, masks that the text omits."""

from __future__ import annotations

from dataclasses import replace

import hlo_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.cost.predict import predict
from shardsim.ops.attend import SOFTMAX
from shardsim.ops.attend_mask import Mask
from shardsim.plan import plan_from_data
from shardsim.program.schedule import Work
from shardsim.xla.hlo import CompiledProgram, HloError, read_hlo
from shardsim.xla.hlo.kernels import Kernel, Masks
from shardsim.xla.hlo.shapes import parse_shape
from shardsim.xla.tpu.evidence import Evidence
from shardsim.xla.tpu.service import Compilation

NAME = "llama-splash"
TABLE = "{ { { 1, 0 }, { 2, 1 } } }"

# One device: 2 sequences of 4 heads over 2 key-value heads, 16 queries and 32 keys of width 128.
# Every array is whole tiles, so that it takes its plain bytes.
B, HEADS, KV, QUERIES, KEYS, DEPTH = 2, 4, 2, 256, 512, 128
PAIRS = B * HEADS * QUERIES * KEYS
Q = f"bf16[{B},{HEADS},{QUERIES},{DEPTH}]"
K = f"bf16[{B},{KV},{KEYS},{DEPTH}]"
Q_BYTES, K_BYTES = 2 * B * HEADS * QUERIES * DEPTH, 2 * B * KV * KEYS * DEPTH
BLOCK_Q, BLOCK_KV = 128, 256
SUMS = {"dkv": f"f32[{B},{HEADS},8,{QUERIES}]", "dq": f"f32[{B},{HEADS},1,{QUERIES}]"}
RESULTS = {
    "fwd": [f"f32[{B},{BLOCK_Q},128]"] * 3 + [Q, f"f32[{B},{HEADS},{QUERIES},128]"],
    "dkv": [f"f32[{B},{BLOCK_KV},128]"] * 2 + [K, K],
    "dq": [f"f32[{B},{BLOCK_Q},128]", Q],
}
RESULTS["fused"] = [*RESULTS["dkv"][:2], Q.replace("[2", "[2,2"), K, K]
PRODUCTS = {"fwd": 2, "dkv": 4, "fused": 5, "dq": 3}
SUFFIX = {"fwd": "_residuals"}
SIZES = {"fwd": ("block_q", "block_kv")}
# Two blocks of queries and two of keys: the first queries see one block of keys. The second block
# of queries begins at 128, the second of keys at 256: it is empty for both.
CAUSAL = "{ { { 1, 0 }, { 1, 0 } } }"
WHOLE = "{ { { 2, 2 }, { 2, 2 } } }"


def kernel_text(
    phase: str,
    table: str = CAUSAL,
    *,
    positions: bool = True,
    grid: str = "2,2",
    keys: str = K,
    values: str = K,
    segments: tuple[str, ...] = (),
    pairs: str = "",
) -> str:
    """Return a module whose only work is one kernel."""
    kernel = "dkv" if phase == "fused" else phase
    operands = [f"s8[1,{grid}]"] * 2 + [Q, keys, values, *segments]
    if kernel != "fwd":
        operands += [SUMS[kernel], Q, SUMS[kernel]]
    if pairs:
        operands.append(pairs)
    if positions:
        operands.append(f"s32[8,{QUERIES}]" if kernel == "dkv" else f"s32[{QUERIES},128]")
    header = ", ".join(f"p{i}: {shape}" for i, shape in enumerate(operands) if i != 1)
    result = f"({', '.join(RESULTS[phase])})"
    lines = [
        "HloModule m, is_scheduled=true, num_partitions=1",
        "",
        f"ENTRY %main ({header}) -> {result} {{",
    ]
    number = 0
    for i, shape in enumerate(operands):
        if i == 1:
            lines.append(f"  %table = {shape} constant({table})")
        else:
            lines.append(f"  %p{i} = {shape} parameter({number})")
            number += 1
    names = ", ".join("%table" if i == 1 else f"%p{i}" for i in range(len(operands)))
    end = SUFFIX.get(phase, "_no_residuals")
    rows, columns = SIZES.get(phase, (f"block_q_{kernel}", f"block_kv_{kernel}"))
    layouts = "".join(f', \\"{name}_layout\\": 1' for name in "qkv")
    lines += [
        f"  ROOT %splash_mha_{kernel}{end}.1 = {result} custom-call({names}),"
        ' custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
        f'"xprof_metadata":"{{\\"{rows}\\": {BLOCK_Q}, \\"{columns}\\": {BLOCK_KV}{layouts}}}"',
        f'}}}}, metadata={{op_name="jit(f)/splash_mha_{kernel}{end}/pallas_call"}}',
        "}",
    ]
    return "\n".join(lines) + "\n"


def a_kernel(
    phase: str, block: tuple[int, int], table: tuple[int, int, int], tokens: int, queries: int = 0
) -> Kernel:
    """Return a kernel of one head whose mask goes by positions."""
    q, k = (parse_shape(f"bf16[1,1,{size},64]") for size in (queries or tokens, tokens))
    given = {"name": "k", "positions": True, "fused": False}
    read = {"streamed_bytes": 0.0, "other_bytes": 0.0}
    return Kernel(phase=phase, q=q, k=k, v=k, block=block, table=table, **given, **read)


def read(text: str, causal: bool | None = None) -> CompiledProgram:
    """Read a module of one device."""
    return read_hlo(text, {"a": 1}, causal)


def doubts(compiled: CompiledProgram) -> list[str]:
    """Return the warnings about masks."""
    return [text for text in compiled.schedule.warnings if "mask" in text]


def test_the_train_step_executes_what_is_planned_and_two_products_of_the_gradient_again() -> None:
    plan, compiled = samples.plan_of(NAME), samples.compiled(NAME)
    model = plan.model
    price = predict(plan).price
    costs = price.computes
    assert compiled.matmul_flops == sum(
        float(cost.flops) for cost in costs if cost.task.kind == "matmul"
    )
    # Of the 2 x 2 blocks of 512 tokens 3 are left. Forward twice, dkv and dq.
    sequences = plan.batch // plan.machine.devices
    pairs = sequences * model.heads * plan.sequence**2 * 3 // 4
    product = 2 * pairs * model.head_dim * model.layers
    attention = compiled.flops - compiled.matmul_flops
    assert attention == (2 + 2 + 4 + 3) * product
    # A flash gradient is planned as one kernel of 5 products; splash has two of 4 and 3.
    assert compiled.flops - float(price.flops) == pytest.approx(2 * product, rel=1e-12)


def test_a_kernel_is_one_task_with_its_softmax() -> None:
    compiled = samples.compiled(NAME)
    plan = samples.plan_of(NAME)
    batch = plan.batch // plan.machine.devices * plan.model.heads
    tasks = [
        task
        for block in compiled.schedule.blocks
        for task in block.computes()
        if task.name.startswith("splash")
    ]
    for task in tasks:
        phase = task.name.split("_")[2]
        assert (task.m, task.k, task.n, task.batch) == (1024, 128, 1024, batch)
        assert (task.kind, task.fraction, task.cycles) == ("attention", 0.75, None)
        assert task.matmuls == PRODUCTS[phase]
        ops = SOFTMAX.ops if phase == "fwd" else SOFTMAX.gradient_ops
        assert task.vector_ops == 0.75 * batch * 1024**2 * ops
    # The last of the 3 layers stands outside of the loops.
    assert len(tasks) == 2 * 4
    assert not doubts(compiled)


def test_a_mask_that_is_not_in_the_text() -> None:
    text = samples.text_of(NAME)
    assert TABLE in text
    text, mesh = text.replace(TABLE, "{...}"), samples.mesh_of(NAME)
    seen = samples.compiled(NAME)
    told = read_hlo(text, mesh, causal=True)
    assert told.flops == seen.flops
    assert not doubts(told)
    unknown = read_hlo(text, mesh)
    inside = seen.flops - seen.matmul_flops
    assert unknown.flops - seen.flops == pytest.approx(inside / 3, rel=1e-12)
    assert len(doubts(unknown)) == 8
    with pytest.raises(HloError, match=r"line [0-9]+: .*mask is not whole"):
        read_hlo(text, mesh, causal=False)


def test_evidence_takes_the_mask_from_the_plan() -> None:
    text = samples.text_of(NAME).replace(TABLE, "{...}")
    plan = samples.plan_of(NAME)
    evidence = Evidence(Compilation(plan=plan, result={}, text=text, code=""))
    assert evidence.compiled.flops == samples.compiled(NAME).flops


@pytest.mark.parametrize("phase", PRODUCTS)
@pytest.mark.parametrize(
    ("table", "positions", "causal", "fraction"),
    [
        (CAUSAL, True, None, 0.5),
        ("{...}", True, True, 1.0),  # the last queries, of as many as there are keys
        (WHOLE, False, None, 1.0),
        ("{...}", False, False, 1.0),
    ],
)
def test_flops_and_bytes(
    phase: str, table: str, positions: bool, causal: bool | None, fraction: float
) -> None:
    compiled = read(kernel_text(phase, table, positions=positions), causal)
    assert not doubts(compiled)
    assert compiled.flops == PRODUCTS[phase] * 2 * PAIRS * DEPTH * fraction
    (operation,) = compiled.operations
    assert operation.kind == "attention"
    kernel = "dkv" if phase == "fused" else phase
    sums = 0.0 if phase == "fwd" else 2 * parse_shape(SUMS[kernel]).bytes
    if kernel == "dkv":  # queries, the gradient of the output and the sums, for 2 blocks of keys
        streamed, once = (2 * Q_BYTES + sums) * 2 * fraction, 2 * K_BYTES
    else:  # keys and values, for 2 blocks of queries of each of 2 heads that share them
        streamed, once = 2 * K_BYTES * 2 * 2 * fraction, Q_BYTES * (1 + (phase == "dq")) + sums
    results = sum(parse_shape(shape).bytes for shape in RESULTS[phase])
    tables = 2 * 4
    assert operation.hbm_bytes == streamed + once + results + tables


def test_of_fewer_queries_than_keys_the_last_are_counted() -> None:
    """Of a sequence over four devices all wait for the one with the last quarter."""
    kernel = a_kernel("fwd", (512, 512), (1, 4, 16), 8192, 2048)
    # Blocks 12 to 15 of queries see 13 to 16 of 16 blocks of keys.
    wanted = (13 + 14 + 15 + 16) / 64
    assert kernel.executed("{...}", Masks(causal=True)).matmuls[0].fraction == wanted
    assert Mask(causal=True).computed(8192, 2048) == pytest.approx(wanted)
    # Of a striped order a device has parts 0 and 3 or 1 and 2: on average the same.
    parts = [sum(range(4 * part + 1, 4 * part + 5)) / 64 for part in range(4)]
    striped = kernel.executed("{...}", Masks(causal=True, striped=True)).matmuls[0].fraction
    assert striped == (parts[0] + parts[3]) / 2 == (parts[1] + parts[2]) / 2


def test_causal_blocks_of_any_size_are_counted() -> None:
    for wide, long in ((128, 128), (256, 768), (768, 256), (512, 1536), (1536, 128)):
        rows, columns = 1536 // wide, 1536 // long
        pairs = [
            any(query >= column * long for query in range(row * wide, (row + 1) * wide))
            for row in range(rows)
            for column in range(columns)
        ]
        whole = a_kernel("fwd", (wide, long), (1, rows, columns), 1536)
        found = whole.executed("{...}", Masks(causal=True))
        assert found.matmuls[0].fraction == sum(pairs) / len(pairs)
        literal = "{ " + ", ".join(str(int(pair)) for pair in pairs) + " }"
        assert whole.executed(literal, Masks(causal=None)).matmuls == found.matmuls


@pytest.mark.parametrize("phase", ["fwd", "dkv", "dq"])
@pytest.mark.parametrize(("wide", "long"), [(128, 128), (256, 128), (128, 384)])
@pytest.mark.parametrize("chunked", [False, True])
def test_blocks_of_a_window_are_counted(phase: str, wide: int, long: int, chunked: bool) -> None:
    tokens, window = 1536, 200
    at = np.arange(tokens)
    back = at[:, None] - at
    shape = (tokens // wide, wide, tokens // long, long)
    near = at[:, None] // window == at // window if chunked else back < window
    blocks = ((back >= 0) & near).reshape(shape).any((1, 3))
    # JAX leaves out of the grid what no row, or column, of it has.
    rows, columns = blocks.shape
    if phase == "dkv":
        rows = int(blocks.sum(0).max())
    else:
        columns = int(blocks.sum(1).max())
    kernel = a_kernel(phase, (wide, long), (1, rows, columns), tokens)
    found = kernel.executed("{...}", Masks(causal=True, windows=(200, 1000), chunked=chunked))
    assert found.matmuls[0].fraction == pytest.approx(blocks.mean(), rel=1e-12)
    assert not found.problem
    with pytest.raises(HloError, match="its mask is not causal"):
        kernel.executed("{...}", Masks(causal=True, windows=(1000,), chunked=chunked))


def test_where_keys_pass_round_kernels_are_whole_beside_those_of_own_keys() -> None:
    own = a_kernel("fwd", (512, 512), (1, 4, 4), 2048)
    whole = replace(own, positions=False)
    with pytest.raises(HloError, match="its mask is not causal"):
        whole.executed("{...}", Masks(causal=True))
    ring = Masks(causal=True, pieces=True)
    assert whole.executed("{...}", ring).matmuls[0].fraction == 1.0
    assert own.executed("{...}", ring) == own.executed("{...}", Masks(causal=True))
    with pytest.raises(HloError, match="its mask is not whole"):
        own.executed("{...}", Masks(causal=False, pieces=True))


@pytest.mark.parametrize(
    ("table", "positions", "grid", "causal", "fraction"),
    [
        ("{ { { 1, 0 }, { 2, 1 } } }", True, "2,2", True, 0.75),  # of another mask
        ("{...}", True, "2,2", None, 1.0),
        ("{...}", False, "2,2", None, 1.0),
        (CAUSAL, False, "2,2", None, 0.5),  # sparse, but not by positions
        ("{ { { 1 }, { 1 } } }", True, "2,1", None, 0.5),  # a local mask: the grid is shrunk
        ("{...}", True, "2,1", None, 0.5),
    ],
)
def test_what_is_doubtful_is_said(
    table: str, positions: bool, grid: str, causal: bool | None, fraction: float
) -> None:
    compiled = read(kernel_text("fwd", table, positions=positions, grid=grid), causal)
    assert compiled.flops == 2 * 2 * PAIRS * DEPTH * fraction
    assert len(doubts(compiled)) == 1


@pytest.mark.parametrize(
    ("phase", "old", "new", "problem"),
    [
        ("fwd", '\\"block_q\\": 128', '\\"block_q\\": 96', "do not fit"),
        ("fwd", '\\"block_q\\": 128', '\\"block_q\\": 64', "do not fit"),
        ("fwd", '\\"block_kv\\": 256', '\\"block_kv\\": 0', "do not fit"),
        ("dq", '\\"block_kv_dq\\": 256', '\\"block_kv\\": 256', "do not fit"),
        ("fwd", '\\"q_layout\\": 1', '\\"q_layout\\": 2', "do not fit"),
        ("fwd", '"xprof_metadata":"{', '"xprof_metadata":"', "without its kernel_metadata"),
        ("fwd", '"xprof_metadata":', '"xprof":', "without its kernel_metadata"),
        ("fwd", "%p0, %table,", "%p0,", "do not fit"),
        ("fwd", "%p3, %p4, %p5", "%p3, %p4", "mask is not|neither causal"),
        ("dkv", "%p5, %p6, %p7", "%p5, %p6", "do not fit"),
        ("dq", "%p6, %p7", "%p7, %p6", "do not fit"),
        ("fwd", CAUSAL, "{ { { 1, 0 }, { 2 } } }", "table of its mask"),
        ("fwd", CAUSAL, "{ { { 1, 0 }, { 1, 7 } } }", "table of its mask"),
        ("fwd", "%splash_mha_fwd_", "%splash_mha_dq_no_", "named like 2 kernels"),
    ],
)
def test_operands_that_do_not_fit_are_refused(phase: str, old: str, new: str, problem: str) -> None:
    text = kernel_text(phase)
    assert old in text
    text = text.replace(old, new)
    try:
        compiled = read(text)
    except HloError as error:
        assert problem.split("|")[0] in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert any("neither causal" in doubt for doubt in doubts(compiled))
        assert "neither causal" in problem


@pytest.mark.parametrize("phase", PRODUCTS)
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (K.replace("512", "256"), K),
        (K.replace("2,2", "2,3"), K.replace("2,2", "2,3")),
        (K.replace("2,2", "1,2"), K.replace("2,2", "1,2")),
        (K.replace("128]", "64]"), K),
        (K.replace("bf16", "f32"), K),
        (f"s8[1,{KEYS},{DEPTH}]", K),
    ],
)
def test_keys_and_values_that_do_not_fit_are_refused(phase: str, keys: str, values: str) -> None:
    with pytest.raises(HloError, match="do not fit"):
        read(kernel_text(phase, keys=keys, values=values))


def test_segments_stand_after_the_values() -> None:
    segments = (f"s32[{QUERIES},128]", f"s32[8,{KEYS}]")
    text = kernel_text("fwd", WHOLE, positions=False, segments=segments)
    named = text.replace("fwd_residuals", "fwd_segmented_residuals")
    compiled = read(named)
    assert compiled.flops == 2 * 2 * PAIRS * DEPTH
    assert not doubts(compiled)
    with pytest.raises(HloError, match="do not fit"):
        read(text)


@pytest.mark.parametrize("phase", ["fwd", "dkv", "dq"])
def test_a_mask_that_the_program_makes_is_read_by_each_head(phase: str) -> None:
    side = (BLOCK_Q, BLOCK_KV) if phase != "dkv" else (BLOCK_KV, BLOCK_Q)
    mask = f"s32[4,{side[0]},{side[1]}]"
    text = kernel_text(phase, "{...}", positions=False, pairs=mask)
    found, without = read(text, True), read(kernel_text(phase, "{...}"), True)
    assert not doubts(found)
    assert found.flops == without.flops
    ((one,), (plain,)) = (each.operations for each in (found, without))
    heads, causal = parse_shape(Q).dims[-3], found.flops / read(text, False).flops
    assert one.hbm_bytes - plain.hbm_bytes == parse_shape(mask).bytes * heads * causal
    with pytest.raises(HloError, match="do not fit"):
        read(kernel_text(phase, positions=False, pairs=mask.replace("s32[4,", "f32[4,")))


def test_values_may_have_a_width_of_their_own() -> None:
    values = K.replace("128]", "256]")
    text = kernel_text("fwd", values=values).replace(
        f"{Q}, f32", f"{Q.replace('128]', '256]')}, f32"
    )
    (operation,) = read(text).operations
    assert operation.flops == 2 * PAIRS * (128 + 256) * 0.5
    assert sum(task.flops for task in operation.tasks()) == operation.flops
    assert sum(task.hbm_bytes for task in operation.tasks()) == operation.hbm_bytes


def test_a_kernel_of_another_name_is_priced_by_bytes() -> None:
    compiled = read(kernel_text("fwd").replace("splash_mha", "my_kernel"))
    assert compiled.flops == 0
    (operation,) = compiled.operations
    assert operation.kind == "elementwise"
    assert operation.hbm_bytes > 2 * Q_BYTES + 2 * K_BYTES
    assert any("my_kernel" in text for text in compiled.schedule.warnings)


@pytest.mark.parametrize("phase", PRODUCTS)
def test_every_digit_of_a_kernel_matters(phase: str) -> None:
    text = kernel_text(phase)
    flops = read(text).flops
    start = text.index("  %p2 =")
    for place in range(start, len(text)):
        if not text[place].isdigit():
            continue
        for digit in "0123459":
            changed = text[:place] + digit + text[place + 1 :]
            try:
                compiled = read(changed)
            except HloError:
                continue
            said = set(compiled.schedule.warnings) - set(read(text).schedule.warnings)
            assert compiled.flops == flops or said, changed[max(place - 40, 0) : place + 20]


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_kernels_are_refused_or_read_rightly(data: st.DataObject) -> None:
    text = kernel_text(data.draw(st.sampled_from(sorted(PRODUCTS))))
    before = read(text)
    place = data.draw(st.integers(0, len(text) - 1))
    end = place + data.draw(st.sampled_from([0, 1, 1, 5, 100]))
    insert = data.draw(st.sampled_from(["", "1", "0", "}", "{", '"', ",", "\\", "\n", "%p2, "]))
    try:
        after = read(text[:place] + insert + text[end:])
    except HloError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    said = set(after.schedule.warnings) - set(before.schedule.warnings)
    assert after.flops == before.flops or said


def test_a_kernel_may_have_other_attributes_before_its_metadata() -> None:
    text = kernel_text("fwd")
    other = text.replace("={kernel_metadata", '={_xla_loop_unroll_strategy="x",kernel_metadata')
    assert other != text
    assert read(other).flops == read(text).flops


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_attribute_over_several_lines_that_is_cut_short_is_an_error(count: int) -> None:
    lines = kernel_text("fwd").splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.endswith("kernel_metadata={"))
    cut = lines[: start + 1] + lines[start + 1 + count :]
    with pytest.raises(HloError):
        read("\n".join(cut) + "\n")
    lines = samples.text_of(NAME).splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("kernel_metadata={"))
    with pytest.raises(HloError):
        read_hlo("\n".join(lines[: start + count]), samples.mesh_of(NAME))


@pytest.mark.parametrize(
    ("result", "good"), [("bf16[64,64]", True), ("s8[128,64]", True), ("bf16[64,63]", False)]
)
def test_a_concat_bitcast_keeps_the_count_or_the_bytes(result: str, good: bool) -> None:
    text = f"""HloModule m, is_scheduled=true, num_partitions=1

ENTRY %main (a: s8[4096], b: s8[4096]) -> {result} {{
  %a = s8[4096] parameter(0)
  %b = s8[4096] parameter(1)
  ROOT %c = {result} custom-call(%a, %b), custom_call_target="ConcatBitcast"
}}
"""
    if good:
        assert read(text).operations == ()
    else:
        with pytest.raises(HloError, match="does not fit its operands"):
            read(text)


@settings(max_examples=30)
@given(
    sequences=st.integers(1, 4),
    blocks=st.integers(1, 12),
    heads=st.sampled_from([(8, 8), (8, 2), (12, 1)]),
    causal=st.booleans(),
)
def test_a_plan_moves_as_many_bytes(
    sequences: int, blocks: int, heads: tuple[int, int], causal: bool
) -> None:
    tokens, depth = 512 * blocks, 128
    data = {
        "model": {
            "base": "llama3-8b" if causal else "vit-h-14",
            **{"name": "small", "layers": 1, "embed": 256, "head_dim": depth},
            **dict(zip(("heads", "kv_heads"), heads, strict=True)),
        },
        **{"machine": "v5p:1x1x1", "batch": sequences, "sequence": tokens, "remat": "full"},
        **{"mesh": {"data": 1}, "attention": "flash"},
    }
    schedule = predict(plan_from_data(data, "a plan")).schedule
    tasks = {task.name: task for _, task, _ in schedule.runs() if isinstance(task, Work)}
    q, k = (parse_shape(f"bf16[{sequences},{n},{tokens},{depth}]") for n in heads)
    logarithms = sequences * heads[0] * tokens * 128 * 4.0
    moved = {
        phase: Kernel(
            name="k",
            phase=phase,
            q=q,
            k=k,
            v=k,
            block=(512, 512),
            table=(1, blocks, blocks),
            positions=causal,
            fused=phase == "dkv" and blocks == 1,
            streamed_bytes=streamed,
            other_bytes=other,
        )
        .executed("{...}", Masks(causal=causal))
        .hbm_bytes
        for phase, streamed, other in (
            ("fwd", 2 * k.bytes, 2 * q.bytes + logarithms),
            ("dkv", 2 * q.bytes, 4 * k.bytes + q.bytes * (blocks == 1)),
            ("dq", 2 * k.bytes, 3 * q.bytes),
        )
    }
    found = {name: task.hbm_bytes for name, task in tasks.items()}
    assert found["context"] == found["context again"] == moved["fwd"]
    # Of one block the first kernel makes the gradient of queries too.
    assert found["context gradient"] == moved["dkv"] + moved["dq"] * (blocks > 1)
