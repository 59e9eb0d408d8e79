"""Kernels that were measured one by one on an H100, beside what the costs say of them.

In a step a GPU at its cap of power runs matmuls faster than in a loop of matmuls, and attention
slower than on its own: the constants are those of a step, and are brought to the loop here.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources

import pytest

from shardsim.cost.costs import costs_of
from shardsim.machine import load_chip
from shardsim.program.gpu_rules import CUDNN_BLOCK, CUDNN_GRADIENT_PASSES
from shardsim.program.schedule import Work

MATMULS_ALONE = 0.72 / 0.76  # at the clock of a loop of matmuls
ATTENTION_ALONE = 1.0 / 0.9  # at the full clock
DATA = resources.files("shardsim.validate") / "data"


def rows(name: str) -> Iterator[dict[str, str]]:
    with resources.as_file(DATA / name) as path, open(path, encoding="utf-8") as file:
        yield from (r for r in csv.DictReader(file) if "H100" in r["device"])


def test_matmuls_by_shape() -> None:
    chip = load_chip("h100")
    alone = replace(chip, matmul_efficiency=chip.matmul_efficiency * MATMULS_ALONE)
    costs = costs_of("calibrated", alone)
    errors = []
    for row in rows("gpu_matmul.csv"):
        m, k, n = (int(row[key]) for key in "mkn")
        moved = 2.0 * (m * k + k * n + m * n)
        task = Work(name="m", kind="matmul", m=m, k=k, n=n, matmuls=1, hbm_bytes=moved)
        errors.append(abs(float(costs.estimate(task).total_s) / float(row["seconds"]) - 1.0))
    assert len(errors) > 60
    assert statistics.median(errors) < 0.06
    assert sorted(errors)[int(0.9 * len(errors))] < 0.15


@pytest.mark.parametrize(("kernel", "fused"), [("cudnn", "beside"), ("flash", "in turn")])
def test_attention_by_length_and_width(kernel: str, fused: str) -> None:
    """Masks and heads of 88 are in none of the shapes that the constants were fitted to."""
    chip = load_chip("h100")
    known = chip.kernels
    assert known is not None
    alone = replace(
        known,
        attention_efficiency=known.attention_efficiency * ATTENTION_ALONE,
        attention_gradient_efficiency=known.attention_gradient_efficiency * ATTENTION_ALONE,
        softmax_ops=known.softmax_ops / ATTENTION_ALONE,
        softmax_gradient_ops=known.softmax_gradient_ops / ATTENTION_ALONE,
    )
    costs = costs_of("calibrated", replace(chip, kernels=alone))
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in rows("gpu_micro.csv"):
        ours = row["kind"] == "attention" and row["op"] == kernel and row["lib"].startswith("torch")
        if not ours or int(row["m_or_tokens"]) < 1024:
            continue
        batch, tokens, heads, depth = (
            int(row[key]) for key in ("batch", "m_or_tokens", "heads", "dim")
        )
        gradient, causal = row["what"] == "bwd", row["causal"] == "True"
        task = Work(
            name="attention",
            kind="attention",
            m=tokens,
            k=depth,
            n=tokens,
            batch=batch * heads,
            matmuls=5 if gradient else 2,
            fraction=(tokens + CUDNN_BLOCK) / (2.0 * tokens) if causal else 1.0,
            hbm_bytes=(CUDNN_GRADIENT_PASSES if gradient else 4.0)
            * (2.0 * batch * tokens * heads * depth),
            fused=fused,
        )
        error = float(costs.estimate(task).total_s) / float(row["seconds"]) - 1.0
        errors[causal or depth == 88].append(abs(error))
    for found in errors.values():
        assert len(found) > 10
        assert statistics.median(found) < 0.075
        assert max(found) < 0.2
