"""The kept list of programs that the reader of compiled steps has read."""

from __future__ import annotations

from pathlib import Path

from shardsim.files import read_yaml
from shardsim.xla.inspect.programs import CASES, features, plan_of

KEPT = read_yaml(Path(__file__).parents[2] / "docs" / "programs.yaml")
KINDS = ("host offload", "experts", "pipeline", "slices")


def test_the_list_has_programs_of_every_kind() -> None:
    rows = [row for row in KEPT["programs"].values() if "problem" not in row]
    assert len(rows) == KEPT["read"] >= 40
    for kind in KINDS:
        assert any(kind in row["features"] for row in rows), kind


def test_cases_are_plans_of_the_kinds_that_their_names_say() -> None:
    cases = read_yaml(CASES)
    shared = cases.pop("shared")
    found = {name: features(plan_of(name, case, shared)) for name, case in cases.items()}
    assert found["experts in a ring, v5p"] == ["experts"]
    assert found["two slices, tensor, v5p"] == ["slices", "collective matmul"]
    assert all(found.values())
