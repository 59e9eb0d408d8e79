"""Published effects of single changes beside what is predicted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from said import shardsim

from shardsim.cost.predict import predict
from shardsim.errors import FileError
from shardsim.planner.changes import changed
from shardsim.validate.effects import CLOSE, Effect, effects

PLAN = {
    "model": "vit-b-16",
    "machine": "v5e:2x2",
    "batch": 256,
    "mesh": {"data": 4},
    "rules": {"activations": {"batch": ["data"]}},
}


def written(folder: Path, **changes: Any) -> Path:
    row = {
        "id": "one",
        "what": "half of the batch",
        "quantity": "step_time_s",
        "before": PLAN,
        "after": {"batch": 128},
        "published": [2.0, 1.0],
        "source": "here",
        **changes,
    }
    path = folder / "effects.yaml"
    path.write_text(yaml.safe_dump({"effects": [row]}))
    return path


def test_an_effect_is_the_ratio_of_two_predictions(tmp_path: Path) -> None:
    (found,) = effects(written(tmp_path))
    from shardsim.plan import plan_from_data

    plan = plan_from_data(PLAN, "plan")
    times = [
        predict(one, implementation="trainer").step_time_s
        for one in (plan, changed(plan, {"batch": 128}))
    ]
    assert found.predicted == pytest.approx(times[1] / times[0] - 1)
    assert found.published == -0.5
    assert found.sign
    assert found.close


def test_what_is_right_and_what_is_close() -> None:
    def of(published: float, predicted: float) -> tuple[bool, bool]:
        one = Effect(
            id="", what="", quantity="mfu", published=published, predicted=predicted,
            source="", filled={},
        )  # fmt: skip
        return one.sign, one.close

    assert of(0.3, 0.3 + 0.99 * CLOSE * 0.3) == (True, True)
    assert of(0.3, 0.3 + 1.01 * CLOSE * 0.3) == (True, False)
    assert of(0.3, -0.1) == (False, False)
    assert of(0.005, -0.004) == (True, True)  # none was seen
    assert of(0.005, -0.2) == (True, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantity": "time"}, r"quantity: 'time' is none"),
        ({"published": [1.0]}, r"published: expected two numbers"),
        ({"before": "vit-22b"}, r"no published run or plan 'vit-22b'"),
        ({"after": {"btach": 1}}, r"unknown key.*did you mean 'batch'"),
    ],
)
def test_a_wrong_pair_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(FileError, match=said) as raised:
        effects(written(tmp_path, **changes))
    assert "effect 1" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_published_ones() -> None:
    found = {one.id: one for one in effects()}
    assert len(found) >= 8
    for name in ("ring-not-overlapped", "fp8", "capacity-factor"):
        assert found[name].sign
        assert found[name].close, name
    assert all(one.source for one in found.values())


def test_the_command_shows_both_and_says_how_many(tmp_path: Path) -> None:
    done = shardsim("validate", "--effects", str(written(tmp_path)))
    assert done.exit_code == 0, done.output
    assert "1 of 1 go the right way, 1 are within a third of their size" in done.output
    assert "-50.0" in done.output
