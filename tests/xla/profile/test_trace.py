"""Traces read: which events are operations of a device, steps, and whom each instant belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import US, chrome

from shardsim.errors import FileError
from shardsim.xla.profile.files import TraceFile
from shardsim.xla.profile.program import Program
from shardsim.xla.profile.steps import NS, Profile, longest_program, profile_of
from shardsim.xla.profile.trace import Span, Trace, read_trace

GPU, TPU = "/device:GPU:0", "/device:TPU:0"
STEP = {"hlo_module": "jit_step"}


def read(path: Path) -> Profile:
    trace = read_trace(path)
    return profile_of(trace, longest_program(trace), Program(None, {}))


def own_us(profile: Profile) -> dict[str, float]:
    """Return what belongs to each operation of a step, in microseconds."""
    return {op.op: round(op.own_s / US, 6) for op in profile.ops}


def test_gpu_streams_are_lined_up_and_transfers_hide_behind_kernels(tmp_path):
    def kernel(name: str, op: str, start: float, length: float) -> tuple:
        return name, start, length, {**STEP, "hlo_op": op, "name": "jit(step)/jvp()/add"}

    rows, nccl, copies = [], [], []
    for start in (0.0, 100.0, 200.0):
        rows += [
            kernel("first", "fusion.1", start, 20.0),
            kernel("last", "fusion.2", start + 60, 10),
        ]
        nccl.append(kernel("ncclDevKernel_AllReduce_Sum", "all-reduce.3", start + 10.0, 30.0))
        copies.append(("MemcpyH2D", start + 35.0, 10.0, {}))
    other = ("elsewhere", 72.0, 3.0, {"hlo_module": "jit_other", "hlo_op": "fusion.1"})
    profile = read(
        chrome(
            tmp_path / "gpu.json.gz",
            {
                (GPU, "Stream #7(Compute)"): [*rows, other],
                (GPU, "Stream #8(Compute)"): nccl,
                (GPU, "Stream #9(MemcpyH2D)"): copies,
                (GPU, "XLA Ops"): [kernel("derived", "fusion.1", 0.0, 300.0)],
                ("/host:CPU", "python"): [("PjitFunction", 0.0, 400.0, {})],
            },
        )
    )
    assert (profile.kind, profile.program, profile.devices) == ("gpu", "jit_step", 1)
    assert profile.steps == 2  # the third run only ends the second
    assert profile.step_s == pytest.approx(100.0 * US)
    assert [op.count for op in profile.ops if op.op == "fusion.2"] == [1.0]
    mine = {op.kernel: round(op.own_s / US, 6) for op in profile.ops}
    # The collective has its 30 us but for 10 beside the first kernel, the copy what is left of it.
    assert mine == {
        "first": 20.0,
        "ncclDevKernel_AllReduce_Sum": 20.0,
        "MemcpyH2D": 5.0,
        "last": 10.0,
        "elsewhere": 1.5,
    }
    assert profile.idle_s == pytest.approx((100.0 - 56.5) * US)


def test_tpu_operations_lie_in_their_loops_and_modules_say_the_steps(tmp_path):
    rows, beside, modules = [], [], []
    for number, start in enumerate((0.0, 100.0)):
        modules.append(("jit_step(7)", start, 80.0, {"run_id": number}))
        rows += [
            ("%while.1 = (f32[4]) while(...)", start + 5.0, 70.0, {}),
            ("%fusion.2 = f32[4] fusion(...)", start + 10.0, 20.0, {"tf_op": "jit(step)/add:"}),
            ("%fusion.2 = f32[4] fusion(...)", start + 40.0, 20.0, {"tf_op": "jit(step)/add:"}),
            ("%all-gather-done.3 = f32[4] all-gather-done(...)", start + 60.0, 5.0, {}),
        ]
        beside.append(("%all-gather-start.3 = f32[4] all-gather(...)", start + 15.0, 50.0, {}))
    profile = read(
        chrome(
            tmp_path / "tpu.json.gz",
            {
                (TPU, "XLA Ops"): rows,
                (TPU, "Async XLA Ops"): beside,
                (TPU, "XLA Modules"): modules,
                (TPU, "Steps"): [("1", 0.0, 300.0, {})],
                (f"{TPU} SparseCore 0", "XLA Ops"): [("%fusion.9", 0.0, 300.0, {})],
            },
        )
    )
    assert (profile.kind, profile.program, profile.steps) == ("tpu", "jit_step(7)", 1)
    mine = own_us(profile)
    gathers = mine.pop("all-gather-done.3") + mine.pop("all-gather-start.3")
    # Ten between the fusions that the loop itself spans, and five that are awaited.
    assert gathers == pytest.approx(15.0)
    assert mine == {"fusion.2": 40.0, "while.1": 15.0}
    assert profile.idle_s == pytest.approx(30.0 * US)


def test_xplane_files_are_read_by_jax(tmp_path):
    reader = pytest.importorskip("jax.profiler").ProfileData
    names = ["%dot.4 = f32[4] dot(...)", "jit_step(7)"]
    metadata = "".join(
        f"event_metadata {{ key: {n} value {{ id: {n} name: '{name}' }} }}"
        for n, name in enumerate(names, 1)
    )

    def line(number: int, name: str, event: int, length_ps: int) -> str:
        events = "".join(
            f"events {{ metadata_id: {event} offset_ps: {at} duration_ps: {length_ps} }}"
            for at in (1_000_000, 5_000_000)
        )
        return f"lines {{ id: {number} name: '{name}' {events} }}"

    text = line(1, "XLA Ops", 1, 2_000_000) + line(2, "XLA Modules", 2, 3_000_000)
    space = reader.text_proto_to_serialized_xspace(f"planes {{ name: '{TPU}' {text} {metadata} }}")
    path = tmp_path / "host.xplane.pb"
    path.write_bytes(space)
    profile = read(path)
    assert (profile.kind, profile.program, profile.steps) == ("tpu", "jit_step(7)", 1)
    assert profile.step_s == pytest.approx(4 * US)
    assert own_us(profile) == {"dot.4": 2.0}
    for damaged in (space[:-3], b"\x03" + space, b"HloModule step"):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="neither an XPlane file nor a Chrome trace"):
            read_trace(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\x1f\x8b\x08nonsense", "a damaged gzip file"),
        (b"{", "not a Chrome trace, or a damaged one"),
        (b"[1, 2]", "not a Chrome trace, or a damaged one"),
        (b'{"events": []}', "not a Chrome trace, or a damaged one"),
        (b'{"traceEvents": [{"ph": "X", "pid": 1, "name": "a"}]}', "no operation of a TPU, GPU"),
        (b'{"traceEvents": []}', "no operation of a TPU, GPU or host device is in this trace"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, shardsim, plan_file, content, message):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    for words in (["verify", str(plan_file)], ["calibrate", str(plan_file)]):
        result = shardsim(*words, "--profile", str(path))
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
        assert str(path) in result.stderr


def test_options_of_profiles_need_one(shardsim, plan_file):
    for words in (
        ["verify", str(plan_file), "--hlo", "x"],
        ["calibrate", str(plan_file)],
        ["calibrate", str(plan_file), "--device", "cpu"],
        ["calibrate", "--profile", "x"],
        ["verify", str(plan_file), "--profile", "nowhere.pb"],
        ["verify", str(plan_file), "--profile", str(plan_file), "--measure"],
    ):
        result = shardsim(*words)
        assert result.exit_code == 2, words
        assert len(result.stderr.splitlines()) == 1


# Operations on two lanes that compute and one of transfers; lower classes go first.

CLASSES = {"fusion.1": 0, "fusion.2": 0, "all-gather.3": 1, "copy.5": 2, "while.4": 3}
PLACES = [(op, lane) for op in CLASSES for lane in ("a", "b") if op != "copy.5"]
SPANS = st.lists(
    st.tuples(
        st.sampled_from([*PLACES, ("copy.5", "beside")]), st.integers(0, 90), st.integers(1, 40)
    ),
    max_size=12,
).map(lambda rows: [("fusion.1", "a", 0, 1), *((*place, *times) for place, *times in rows)])


def traced(
    spans: Sequence[tuple[str, str, int, int]],
    runs: Mapping[str, tuple[tuple[float, float, str], ...]],
) -> Trace:
    made = [
        Span(
            device="0",
            lane=lane,
            beside=lane == "beside",
            op=op,
            kernel="",
            program="step",
            run="",
            scope="",
            start_ns=float(start),
            end_ns=float(start + length),
        )
        for op, lane, start, length in spans
    ]
    file = TraceFile(path="made", xplane=False, data=b"")
    ordered = tuple(sorted(made, key=lambda span: span.start_ns))
    return Trace(path="made", kind="gpu", spans=ordered, runs=runs, file=file)


@given(SPANS)
def test_every_instant_of_a_step_belongs_to_one_class(spans):
    runs = {"0": ((0.0, 100.0, "step"), (100.0, 200.0, "step"))}
    profile = profile_of(traced(spans, runs), "step", Program(None, {}))
    assert profile.step_s == pytest.approx(100.0 * NS)
    assert sum(op.own_s for op in profile.ops) + profile.idle_s == pytest.approx(profile.step_s)
    assert profile.idle_s >= -1e-18
    ticks = [0.0, 0.0, 0.0, 0.0]
    for tick in range(100):
        tops: dict[str, str] = {}  # of each lane: what began last
        for op, lane, start, length in sorted(spans, key=lambda one: (one[2], -one[3])):
            if start <= tick < start + length:
                tops[lane] = op
        if tops:
            ticks[min(CLASSES[op] for op in tops.values())] += 1.0
    found = [0.0, 0.0, 0.0, 0.0]
    for one in profile.ops:
        found[CLASSES[one.op]] += one.own_s / NS
    assert found == pytest.approx(ticks)


@given(st.integers(2, 6), st.integers(1, 4))
def test_steps_that_nothing_numbers_are_found_by_what_runs_once_in_each(steps, layers):
    spans, at = [], 0
    for _ in range(steps):
        spans.append(("fusion.1", "a", at, 2))
        for layer in range(layers):
            spans.append(("fusion.2", "a", at + 3 + 2 * layer, 2))
        spans.append(("copy.5", "a", at + 3 + 2 * layers, 1))
        at += 10 + 2 * layers
    profile = profile_of(traced(spans, {}), "step", Program(None, {}))
    assert profile.steps == steps - 1
    assert profile.step_s == pytest.approx((10 + 2 * layers) * NS)
    assert {op.op: op.count for op in profile.ops} == pytest.approx(
        {"fusion.1": 1, "fusion.2": layers, "copy.5": 1}
    )
