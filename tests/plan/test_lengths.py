"""Sequences of many lengths: what is sampled, how rows hold them, what the fullest member has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.errors import PlanError
from shardsim.plan.lengths import (
    HELD,
    SAMPLE,
    Lengths,
    fullest,
    parse_lengths,
    real_tokens,
    rows_of,
    sampled,
)

distributions = st.one_of(
    st.builds(lambda mean: {"distribution": "constant", "mean": mean}, st.integers(1, 600)),
    st.builds(
        lambda least, more: {"distribution": "uniform", "least": least, "most": least + more},
        st.integers(1, 300),
        st.integers(0, 300),
    ),
    st.builds(
        lambda mean, deviation: {
            "distribution": "log_normal",
            "mean": mean,
            "deviation": deviation,
        },
        st.integers(2, 300),
        st.integers(1, 300),
    ),
    st.builds(
        lambda lines: {"histogram": [list(line) for line in lines]},
        st.lists(st.tuples(st.integers(1, 600), st.floats(0.1, 9)), min_size=1, max_size=5),
    ),
)


@settings(max_examples=30, deadline=None)
@given(data=distributions, held=st.sampled_from(HELD), row=st.integers(64, 1024))
def test_rows_hold_every_sequence_once_and_none_is_over_full(
    data: dict[str, object], held: str, row: int
) -> None:
    lengths = parse_lengths({**data, "as": held}, "plan.yaml")
    assert lengths is not None
    rows = rows_of(lengths, row)
    every = sorted(one for held_ones in rows for one in held_ones)
    assert every == sorted(int(one) for one in sampled(lengths, row))
    assert max(map(sum, rows)) <= row
    if lengths.packed:  # first fit: no two rows are both at most half full
        assert sum(sum(one) <= row / 2 for one in rows) <= 1
    else:
        assert len(rows) == SAMPLE
    assert real_tokens(lengths, row) * len(rows) == pytest.approx(sum(every))
    assert parse_lengths(lengths.to_data(), "plan.yaml") == lengths


def test_a_log_normal_has_its_mean_and_deviation() -> None:
    one = Lengths(distribution="log_normal", mean=600, deviation=300)
    tokens = sampled(one, 10**6)
    assert tokens.mean() == pytest.approx(600, rel=2e-3)
    assert tokens.std() == pytest.approx(300, rel=2e-2)
    half = Lengths(distribution="log_normal", mean=600, deviation=300, dropped=0.5)
    assert sampled(half, 10**6).mean() == pytest.approx(300, rel=3e-3)


def test_the_fullest_of_many_members_is_what_many_batches_say() -> None:
    values = sampled(Lengths(distribution="log_normal", mean=500, deviation=300), 2048)
    random = np.random.default_rng(9)
    for each, members in ((1, 8), (4, 64), (256, 32)):
        sums = random.choice(values, (400, members, each)).sum(2)
        drawn = (sums.max(1) / (each * values.mean())).mean()
        assert fullest(values, each, members) - 1 == pytest.approx(drawn - 1, rel=0.08)
    many = fullest(values, np.array([1, 4, 4]), np.array([8, 64, 1]))
    assert many[2] == 1.0
    assert many[1] == fullest(values, 4, 64)


def test_images_of_many_sizes_are_patches(tmp_path: Path) -> None:
    (tmp_path / "sizes.csv").write_text("height,width,share\n224,224,3\n448,224,1\n")
    plan = str(tmp_path / "plan.yaml")
    lengths = parse_lengths({"histogram": "sizes.csv", "as": "packed"}, plan, patch=14)
    assert lengths is not None
    assert lengths.histogram == ((256, 3.0), (512, 1.0))
    assert sampled(lengths, 1024).mean() == 320
    (tmp_path / "sizes.yaml").write_text("- [224, 224, 3]\n- [448, 224, 1]\n")
    again = parse_lengths({"histogram": "sizes.yaml", "as": "packed"}, plan, patch=14)
    assert again == lengths


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"distribution": "normal", "mean": 5}, r"lengths.distribution: 'normal' is not possible"),
        ({"mean": 5, "as": "ragged"}, r"lengths.as: 'ragged' is not possible"),
        ({"distribution": "log_normal", "mean": 5}, r"lengths.deviation: log_normal lengths need"),
        ({"mean": 5, "most": 9}, r"lengths.most: constant lengths have mean"),
        ({"mean": 5, "dropped": 1.0}, r"lengths.dropped: a share from 0 to below 1, not 1.0"),
        ({"distribution": "uniform", "least": 9, "most": 5}, r"lengths.most: 5 is less than"),
        ({"histogram": [[3]]}, r"lengths.histogram: expected \[tokens, share\]"),
        ({"histogram": [[224, 224, 1]]}, r"sizes of images need a model with patches"),
        ({"histogram": [[5, 0], [6, 0]]}, r"lengths.histogram: every share is 0"),
        ({"histogram": [[1e30, 1]]}, r"lengths.histogram: expected \[tokens, share\]"),
        ({"histogram": "nowhere.csv"}, r"nowhere.csv: No such file"),
        ({"lenght": 5}, r"lengths: unknown key 'lenght'"),
        ({"mean": "long"}, r"lengths.mean: expected tokens, not 'long'"),
        ({"mean": -4}, r"lengths.mean: expected tokens, not -4"),
    ],
)
def test_what_is_no_distribution_is_refused_in_one_line(data: object, said: str) -> None:
    with pytest.raises(Exception, match=said) as raised:
        parse_lengths(data, "plan.yaml")
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, PlanError) or "No such file" in said
