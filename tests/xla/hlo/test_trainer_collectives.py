"""A trainer's compiled collectives beside the plan's."""

from __future__ import annotations

import hlo_samples as samples
import pytest

from shardsim.xla.trainers.collectives import collective_rows


def test_collectives_of_a_trainer_are_summed_by_kind_and_axes() -> None:
    """The same bytes as the reader's, whatever the names of the trainer's scopes."""
    text, mesh = samples.text_of("llama-partitioned"), samples.mesh_of("llama-partitioned")
    rows, remarks = collective_rows(samples.plan_of("llama-partitioned"), text, mesh)
    assert remarks == ()
    sent = sum(c.sent_bytes * c.count for c in samples.compiled("llama-partitioned").collectives)
    assert sum(row["compiled_bytes"] for row in rows) == pytest.approx(sent)
    assert any(row["planned_bytes"] for row in rows)
    assert len({(row["kind"], *row["mesh_axes"]) for row in rows}) == len(rows)


def test_a_program_that_cannot_be_read_is_a_remark() -> None:
    plan = samples.plan_of("llama-partitioned")
    assert collective_rows(plan, "HloModule x", {"a": 8})[1][0].startswith("collectives: ")
    assert collective_rows(plan, None, {"a": 8})[1][0].startswith("collectives: ")
