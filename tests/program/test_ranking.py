"""The order of plans: predicted as emitted, and as the compiler's kept programs replay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from shardsim.xla.tpu.agreement import Pair, pairs, summary

# Of Kendall's tau of step times, of every group with three compiled plans or more.
FLOOR = 0.75
# Without prefetching ViT-22B is 1 % faster on v6e, predicted 2 % slower; its ring of the sequence
# is predicted 8 % too fast (docs/compiled.md).
MISSED = {"vit-22b on v6e:16x16": 0.7}


@pytest.fixture(scope="module")
def kept() -> list[Pair]:
    return pairs()


@pytest.mark.slow
def test_plans_are_ranked_as_their_compiled_programs(kept: list[Pair]) -> None:
    groups = summary(kept)["groups"]
    several = {name: group for name, group in groups.items() if group["compiled"] > 2}
    assert several
    for name, group in several.items():
        assert group["rank_correlation"] >= MISSED.get(name, FLOOR), name


def test_operations_agree(kept: list[Pair]) -> None:
    figures = summary(kept)
    # 0.055 before what a kernel reads was padded in passes of its own, which ViT-bigG's programs do
    # and which had made up for its products of k = 1664.
    assert figures["operations_median_abs_error"] < 0.065
    assert figures["peak_within_10_percent"] >= 0.9


def test_rings_on_v5e_wait_as_compiled(kept: list[Pair]) -> None:
    """Permutes that hide nothing: most of what the compiler exposes is predicted."""
    for pair in some(p for p in kept if "v5e" in p.row["group"] and is_ring(p.row)):
        exposed_s = pair.predicted.time["exposed_comm_s"]
        assert 0.8 < exposed_s / pair.row["exposed_comm_s"] < 1.05


def test_rings_of_the_partitioner_wait_as_compiled(kept: list[Pair]) -> None:
    """With one ring for all products of a sum less than half of it was predicted."""
    tensor = (p for p in kept if "partitioned, tensor" in p.row["kind"] and "step_time_s" in p.row)
    for pair in some(tensor):
        exposed_s = pair.predicted.time["exposed_comm_s"]
        assert 0.8 < exposed_s / pair.row["exposed_comm_s"] < 1.05


def test_sparse_cores_hide_weights_as_compiled(kept: list[Pair]) -> None:
    for pair in some(p for p in kept if "tpu7x" in p.row["group"] and "fsdp" in p.row["kind"]):
        if pair.row["kind"].startswith("partitioned"):  # one of its reductions waits: 0.7 %
            continue
        error_s = pair.predicted.time["exposed_comm_s"] - pair.row["exposed_comm_s"]
        assert abs(error_s) < 0.006 * pair.row["step_time_s"]


def test_norms_by_position_cost_as_compiled_where_nobody_looked(kept: list[Pair]) -> None:
    """They were read off ViT-22B on v5p; these are its plans on v4 and v6e."""
    left_out = ("vit-22b on v4:8x8x16", "vit-22b on v6e:16x16")
    found = some(pair for pair in kept if pair.row["group"] in left_out and is_ring(pair.row))
    errors = sorted(abs(pair.operations_error or 0.0) for pair in found)
    assert errors[len(errors) // 2] < 0.05  # without the rule 0.06


def some(found: Iterable[Pair]) -> list[Pair]:
    """Return pairs of the evidence; skip a test of those that it has none of."""
    pairs = list(found)
    if not pairs:
        pytest.skip("none of these plans is compiled yet with the step as it is emitted now")
    return pairs


def is_ring(row: dict[str, Any]) -> bool:
    """Return whether a compiled plan has collective matmuls of its own."""
    kind = row["kind"]
    tensor = "tensor" in kind and not any(word in kind for word in ("no overlap", "partitioned"))
    return tensor and "step_time_s" in row
