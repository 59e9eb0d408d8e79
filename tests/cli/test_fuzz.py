"""A few hundred inputs of `tests/fuzz.py`, and those of its findings that need a file."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from fuzz import Case, run, shown
from fuzz_cases import BIG_VISION, EXPERTS, GOOD, KINDS, SCALARS, case_of, changed

# Kinds whose commands are quick, and how many of each: together some seconds.
MANY = {"choices": 25, "maxtext": 30, "config_json": 60, "big_vision": 30, "from_outside": 30}
MANY |= {"kept": 40, "chip_file": 25, "levanter": 25, "model_file": 30, "plan_file": 30}


@pytest.mark.parametrize("kind", MANY)
def test_random_inputs(kind: str) -> None:
    assert kind in {one.__name__ for one in KINDS}
    for number in range(MANY[kind]):
        case = case_of(7, number, kind)
        failure = run(case)
        assert failure is None, shown(number, case, failure)


FOUND = {
    "a name too long for a file": Case(
        ("import", f"config.py:{'a' * 3000}", "--from", "big_vision")
    ),
    "a billion layers": Case(
        ("import", "c.py", "--from", "big_vision", "--on", "v4:4x4x4"),
        {
            "c.py": BIG_VISION.replace(
                "  for name", "  config.model.depth = 10 ** 9\n  for name"
            ).encode()
        },
    ),
    "a billion experts": Case(
        ("predict", "plan.yaml", "--set", "model.experts.number=999999937"),
        {"plan.yaml": EXPERTS.encode()},
    ),
    "a price of another chip": Case(
        ("predict", "vit-22b-published-tp8", "--chip-hour-price", "v5e=1")
    ),
    "a null byte in the name of a file": Case(("export", "plan.yaml", "-o", "a\x00b")),
    "no words at all": Case(()),
    "sizes over slices that there are not": Case(
        ("import", "run.sh", "--from", "maxtext", "--on", "v5p:4x4x4"),
        {
            "run.sh": b"python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b "
            b"per_device_batch_size=4 dcn_sequence_parallelism=2"
        },
    ),
    "a runs file without runs": Case(("validate", "--runs", "r.yaml"), {"r.yaml": b"runs: []"}),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str) -> None:
    failure = run(FOUND[what])
    assert failure is None, shown(0, FOUND[what], failure)


def test_the_fuzz_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails, that hangs or leaves half a file is noticed."""

    def wrong(*_: object) -> None:
        raise KeyError("a\nb")

    def half(*_: object) -> None:
        Path(".shardsim-x").write_text("half")

    case = Case(("models", "vit-b-16"))
    monkeypatch.setattr("shardsim.cli.catalog.read_model", wrong)
    assert (failure := run(case)) is not None
    assert failure.what.startswith("KeyError")
    monkeypatch.setattr("shardsim.cli.catalog.answer", half)
    monkeypatch.undo()
    monkeypatch.setattr("shardsim.cli.catalog.answer", half)
    assert (failure := run(case)) is not None
    assert failure.what == "half-written"


def test_a_case_changes_no_value_that_others_are_made_of() -> None:
    before = repr((SCALARS, GOOD))
    random = Random(0)
    for _ in range(1000):
        changed(random, {"remat": "full"})
    assert repr((SCALARS, GOOD)) == before
