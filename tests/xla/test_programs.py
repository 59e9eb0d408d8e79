"""MaxText's compiled programs: what is kept of them, and how a value's kind is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from shardsim.cost.predict import predict
from shardsim.errors import FileError
from shardsim.program.schedule import Move
from shardsim.views.evidence import hbm
from shardsim.views.write import markdown
from shardsim.xla.hlo.buffers import read_assignment
from shardsim.xla.tpu.agreement import to_data, trainers
from shardsim.xla.trainers.classes import classified
from shardsim.xla.trainers.collect import _collectives, _refused
from shardsim.xla.trainers.programs import both, compiled, programs

BOTH = both()


def test_the_page_shows_the_programs() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "trainers.md").read_text("utf-8")
    assert markdown(hbm(trainers()).without("as")).strip() in page


def test_enough_programs_on_every_generation_are_kept() -> None:
    assert len(BOTH) >= 16
    assert {one.machine.chip.name for one, _ in BOTH} >= {"v4", "v5e", "v5p", "v6e", "tpu7x"}
    assert set(compiled()) <= {one.id for one in programs()}
    apart = sum(one.apart for one, _ in BOTH)
    assert len(BOTH) / 4 < apart < len(BOTH) / 2


@pytest.mark.parametrize(("program", "row"), BOTH, ids=[one.id for one, _ in BOTH])
def test_what_is_kept_adds_up(program, row) -> None:
    assert row["versions"].keys() >= {"maxtext", "jax", "libtpu"}
    assert sum(row["at_peak"].values()) == pytest.approx(row["peak_bytes"], rel=2e-3)
    assert row["peak_bytes"] <= row["allocated_bytes"] < 1.2 * row["peak_bytes"]
    assert row["arguments_bytes"] <= row["at_peak"]["state"] * 1.001
    flags = {flag.partition("=")[0] for flag in program.flags}
    assert {flag.partition("=")[0] for flag in row["refused_flags"]} <= flags
    assert program.plan.machine == program.machine


# What no rule covers: on v5e the head's table is not there beside the stacks that come back from
# the host; layers that are no loop are not in a plan (import says so). On eight v6e the compiler
# brings 12 GiB of mistral-7b's 24 back.
NOT_COVERED = {"llama31-8b-v5e-256", "llama2-7b-v5p-64-unrolled", "mistral-7b-v6e-8"}


def errors(apart: bool) -> list[float]:
    """Return errors of HBM peaks of those programs that rules were, or were not, made from."""
    kept_apart = {one.id for one in programs() if one.apart}
    return [
        abs(pair.peak_error)
        for pair in trainers()
        if pair.row["kind"] not in NOT_COVERED
        and pair.row["compiled"]
        and (pair.row["kind"] in kept_apart) == apart
    ]


@pytest.mark.parametrize(("apart", "share"), [(False, 0.9), (True, 0.85)])
def test_hbm_peaks_of_maxtext_s_programs_are_predicted(apart, share) -> None:
    found = np.array(errors(apart))
    assert len(found) >= 8
    assert np.mean(found <= 0.05) >= share  # 8 of the 9 that no rule was made from
    assert found.max() <= 0.1


def test_what_comes_back_from_the_host_whole() -> None:
    """With what attention adds to the stream, stacks of 6 GiB each; without it they stay there."""
    found = {pair.row["kind"]: pair.predicted.use.at_peak for pair in trainers()}
    whole = {
        kind: sum(held.size_bytes for held in there if held.name.startswith("brought back"))
        for kind, there in found.items()
        if kind.startswith("llama31-8b-v6e-16-")
    }
    assert {kind: size / 2**30 for kind, size in whole.items()} == {
        "llama31-8b-v6e-16-without-output": 0.0,
        "llama31-8b-v6e-16-output-on-device": 6.0,
        "llama31-8b-v6e-16-without-projections": 12.0,
        "llama31-8b-v6e-16-batch5": 20.0,
    }


def test_whether_maxtext_s_programs_fit_is_predicted() -> None:
    assert [pair.row["kind"] for pair in trainers() if pair.wrongly_fitting] == []
    assert [pair.row["kind"] for pair in trainers() if pair.wrongly_refused] == []
    assert sum(pair.row["does_not_fit"] for pair in trainers()) >= 2
    for pair in trainers():
        hbm = pair.predicted.hbm
        assert hbm["thrifty_bytes"] <= hbm["peak_bytes"] <= hbm["lavish_bytes"]
        if pair.row["kind"] not in NOT_COVERED:  # a bound from below and one from above
            assert (
                hbm["thrifty_bytes"] <= 1.05 * pair.row["peak_bytes"] <= 1.1 * hbm["lavish_bytes"]
            )


@pytest.mark.parametrize(
    ("id", "fits"),
    [
        ("llama2-70b-v5p-64-batch4", True),
        ("llama2-13b-v5e-256-batch8", True),
        ("llama3-70b-v6e-256-optimizer-offload", False),
        ("llama3-70b-v6e-256", False),
        ("recipes-v6e-llama31-8b-16", True),
        ("llama31-8b-v6e-16-batch5", False),
        ("llama31-8b-v6e-8", False),
        ("gpt3-175b-v6e-256", True),
    ],
)
def test_reported_cases_are_judged_as_today_s_compiler_does(id, fits) -> None:
    (pair,) = (pair for pair in trainers() if pair.row["kind"] == id)
    assert pair.row["compiled"] == pair.predicted.fits == fits
    assert abs(pair.peak_error) < 0.05


def test_the_evidence_counts_what_it_shows() -> None:
    data = to_data([], trainers())
    assert json.loads(json.dumps(data)) == data
    assert len(data["plans"]) == len(trainers())
    compiled_ones = [plan for plan in data["plans"] if plan["fits"]["compiled"]]
    within = [abs(plan["hbm_error"]) <= 0.1 for plan in compiled_ones]
    assert data["hbm"]["within_10"] == pytest.approx(sum(within) / len(within))
    assert data["hbm"]["within_5"] <= data["hbm"]["within_10"]
    assert set(data["versions"]) >= {"maxtext", "libtpu"}
    first = trainers()[0]
    wrong = dataclasses.replace(first, row={**first.row, "does_not_fit": True})
    assert to_data([], [wrong])["hbm"]["false_fits"]


LOOP = 'metadata={op_name="jit(f)/jvp()/while/body/x"}'
BACK = 'metadata={op_name="jit(f)/transpose(jvp())/while/body/dot_general"}'
WEIGHT, GRADIENT = "bf16[1,4096,11008]{2,1,0}", "bf16[4096,11008]{1,0}"
START = "(bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%p)"
TEXT = f"""%fused_computation.1 (p: bf16[1,16,8]) -> bf16[1,4096,11008] {{
  %all-gather.1 = {WEIGHT} all-gather(%p), channel_id=7, {LOOP}
}}
%body (p: bf16[2]) -> bf16[2] {{
  %all-gather.2 = {WEIGHT} all-gather(%p), channel_id=7, {LOOP}
  %all-reduce.1 = {GRADIENT} all-reduce(%p), channel_id=8, {BACK}
  %all-gather-start.1 = {START}, channel_id=9, metadata={{op_name="x"}}
}}
ENTRY %main (p: bf16[2]) -> bf16[2] {{
  %grad.1 = {GRADIENT} convolution(%p), {BACK}
  %all-reduce.2 = {GRADIENT} all-reduce(%grad.1), channel_id=10
}}
"""


def test_collectives_of_loops_count_every_layer_and_pieces_once() -> None:
    found = {(row["kind"], row["how"]): row for row in _collectives(TEXT, 32)}
    weight = 4096 * 11008 * 2
    assert found["all-gather", "synchronous"] == {
        "kind": "all-gather",
        "how": "synchronous",
        "count": 32,
        "array_bytes": 32 * weight,
    }
    assert found["all-gather", "asynchronous"]["array_bytes"] == 8 * 4 * 2
    assert found["all-reduce", "synchronous"]["count"] == 32 + 1


def test_kinds_are_told_by_shape_and_by_what_made_a_value() -> None:
    program = next(one for one in programs() if one.id == "llama2-7b-v5p-64-full")
    values = [
        ("stack", "bf16[32,4,4096,4096]{3,2,1,0}", "kept activations"),
        ("all-gather.1", "bf16[1,4096,11008]{2,1,0}", "gathered weights"),
        ("all-reduce.2", "bf16[4096,11008]{1,0}", "whole gradients"),
        ("grad.1", "bf16[4096,32,128]{2,1,0}", "whole gradients"),
        ("sums", "f32[32,64,11008]{2,1,0}", "gradients"),
        ("cast", "bf16[64,32,11008]{2,1,0}", "weights cast ahead"),
        ("mlp", "bf16[4,4096,11008]{2,1,0}", "workspace"),
    ]
    lines = ["BufferAssignment:", "allocation 0: size 99999, page 0, preallocated-temp:"]
    spans = ["HloLiveRange (max 9):", "  BufferLiveRange:"]
    for number, (name, shape, _) in enumerate(values):
        lines.append(f" value: <{number} {name} @0> (size=10,offset={10 * number}): {shape}")
        spans.append(f"    {name}{{}}:1-2")
    held = read_assignment("\n".join(lines), "\n".join(spans))
    kinds = {buffer.name: kind for kind, buffer in classified(held, TEXT, program.plan)}
    assert kinds == {name: kind for name, _, kind in values}


def test_a_refused_flag_is_found_in_what_libtpu_says() -> None:
    flags = [
        "xla_a=true",
        "xla_a_b=true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    ]
    assert _refused("Error: No such compile option: 'xla_a_b'", flags) == "xla_a_b=true"
    said = "FAILED_PRECONDITION: Continuation fusion for AllGather is enabled on platform x"
    assert _refused(said, flags) == flags[2]
    assert _refused("RuntimeError: something else", flags) is None


def test_a_damaged_list_is_refused(tmp_path) -> None:
    path = tmp_path / "programs.yaml"
    path.write_text("programs: [{id: a}]\n")
    with pytest.raises(FileError, match="expected flags and programs"):
        programs(path)


# Programs without host offload or accumulation, whose counts are of one pass over the layers.
PLAIN = (
    *("maxtext-v4-22b-1x128", "maxtext-v5e-16b-1x256", "maxtext-v5e-64b-1x256"),
    *("llama2-70b-v5p-64-batch4", "llama2-7b-v5p-64-full", "llama2-7b-v5p-64-minimal"),
    *("llama2-7b-v5e-64", "llama3-8b-tpu7x-64"),
)
# Their rings gather for one matmul, and once more for the others that read the same.
WITH_RINGS = (
    "maxtext-v5p-32b-1x64c",
    "maxtext-v5p-128b-1x128c",
    "maxtext-v5p-1024b-1x1024c",
    "llama3-70b-v5p-128-tensor-4",
)


@pytest.mark.parametrize("name", [*PLAIN, *WITH_RINGS])
def test_a_trainer_gathers_what_its_compiled_program_gathers(name: str) -> None:
    ((program, row),) = (pair for pair in BOTH if pair[0].id == name)
    costs = predict(program.plan, implementation="trainer").price.collectives
    predicted = {
        beside: sum(
            float(cost.task.bytes * cost.count)
            for cost in costs
            if isinstance(cost.task, Move)
            and cost.task.kind == "all-gather"
            # Only what stands beside rings says that it is for the others.
            and (beside or "for the others" not in cost.task.name)
        )
        for beside in (True, False)
    }
    compiled = sum(
        entry["array_bytes"] for entry in row["collectives"] if entry["kind"] == "all-gather"
    )
    assert predicted[True] == pytest.approx(compiled, rel=0.012)
    assert (predicted[False] < 0.9 * compiled) == (name in WITH_RINGS)
