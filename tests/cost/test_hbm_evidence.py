"""HBM and operations of kept compilations: the compiler's own figures, which no formula made."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from shardsim.xla.tpu.agreement import Pair, pairs

# A quicker test of the same rows is that of `test_liveness`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kept() -> list[Pair]:
    return pairs()


def test_peaks_are_those_of_the_compiler(kept):
    errors = np.array([pair.peak_error for pair in kept if pair.peak_error is not None])
    assert len(errors) >= 30
    assert np.median(np.abs(errors)) < 0.036
    assert np.mean(np.abs(errors)) < 0.054
    assert np.mean(np.abs(errors) < 0.1) > 0.86


def test_no_kind_of_plan_is_far_off_as_a_whole(kept):
    by_kind = defaultdict(list)
    for pair in kept:
        if pair.peak_error is not None:
            by_kind[pair.row["kind"]].append(pair.peak_error)
    for kind, errors in by_kind.items():
        if len(errors) >= 4:
            assert abs(np.mean(errors)) < 0.06, kind
