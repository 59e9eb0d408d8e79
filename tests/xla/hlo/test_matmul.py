"""Matmuls written as convolutions."""

from __future__ import annotations

import math

import hlo_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo import HloError
from shardsim.xla.hlo.matmul import _hits, _outputs, _Window, matmul_of
from shardsim.xla.hlo.text import parse_module

TEXT = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[{lhs}], y: f32[{rhs}]) -> f32[{out}] {{
  %x = f32[{lhs}] parameter(0)
  %y = f32[{rhs}] parameter(1)
  ROOT %z = f32[{out}] {code}(%x, %y), {attributes}
}}
"""


def matmul(
    lhs: list[int], rhs: list[int], out: list[int], attributes: str, code: str = "convolution"
):
    """Return the matmul of one instruction."""
    shapes = {"lhs": lhs, "rhs": rhs, "out": out}
    words = {name: ",".join(map(str, dims)) for name, dims in shapes.items()}
    module = parse_module(TEXT.format(code=code, attributes=attributes, **words))
    entry = module.computations[module.entry]
    return matmul_of(entry["z"], entry["x"].shape, entry["y"].shape)


SIZES = st.tuples(*[st.integers(2, 7)] * 4)


@given(sizes=SIZES)
def test_the_ways_in_which_the_compiler_writes_a_product(sizes: tuple[int, ...]) -> None:
    m, k, n, b = sizes
    flops = 2 * m * k * n * b
    dot = matmul(
        [b, m, k],
        [b, k, n],
        [b, m, n],
        "lhs_batch_dims={0}, rhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
        "dot",
    )
    assert (dot.m, dot.k, dot.n, dot.batch) == (m, k, n, b)
    rows = matmul([b, m, k], [1, k, n], [b, m, n], "window={size=1}, dim_labels=0bf_0io->0bf")
    assert (rows.m, rows.k, rows.n, rows.batch) == (m * b, k, n, 1)
    summed = matmul(
        [b, k, m], [b, k, n], [m, n, 1], f"window={{size={b}}}, dim_labels=0fb_0io->bf0"
    )
    assert (summed.m, summed.k, summed.n, summed.batch) == (m, k * b, n, 1)
    batched = matmul(
        [b, m, k],
        [b, k, n],
        [b, m, n],
        f"window={{size={b} stride={b - 1} lhs_dilate={b}}}, dim_labels=0bf_0io->0bf",
    )
    assert (batched.m, batched.k, batched.n, batched.batch) == (m, k, n, b)
    columns = matmul(
        [1, m, k],
        [b, k, n],
        [b, m, n],
        f"window={{size={b} pad={b - 1}_{b - 1} rhs_reversal=1}}, dim_labels=0bf_0io->0bf",
    )
    assert (columns.m, columns.k, columns.n, columns.batch) == (m, k, n * b, 1)
    assert {dot.flops, rows.flops, summed.flops, batched.flops, columns.flops} == {flops}


@given(
    size_in=st.integers(1, 9),
    size=st.integers(1, 6),
    stride=st.integers(1, 4),
    low=st.integers(-1, 5),
    high=st.integers(-1, 5),
    lhs=st.integers(1, 4),
    rhs=st.integers(1, 3),
)
def test_hits_are_those_of_walking_through_all_positions(
    size_in: int, size: int, stride: int, low: int, high: int, lhs: int, rhs: int
) -> None:
    window = _Window(size, stride, low, high, lhs, rhs)
    holes = [i % lhs == 0 for i in range((size_in - 1) * lhs + 1)]
    line = [False] * low + (holes[-low:] if low < 0 else holes) + [False] * high
    line = line[:high] if high < 0 else line
    reach = (size - 1) * rhs + 1
    starts = [at for at in range(0, len(line), stride) if at + reach <= len(line)]
    assert _outputs(window, size_in) == len(starts)
    walked = sum(line[at + i * rhs] for at in starts for i in range(size))
    if low >= 0 and high >= 0:
        assert _hits(window, size_in, len(starts)) == walked


@pytest.mark.parametrize(
    ("out", "attributes"),
    [
        ([3, 4, 6], "window={size=1}, dim_labels=0bf_0io->0bf"),
        ([3, 4, 5], "window={size=2}, dim_labels=0bf_0io->0bf"),
        ([3, 4, 5], "window={size=1 stride=2}, dim_labels=0bf_0io->0bf"),
        ([3, 4, 5], "window={size=1}, dim_labels=0bf_0oi->0bf"),
        ([3, 4, 5], "window={size=1}, dim_labels=0bf_0io->0bb"),
        ([3, 4, 5], "window={size=1x1}, dim_labels=0bf_0io->0bf"),
        ([3, 4, 5], "window={size=1}, dim_labels=0bf_0io->0bf, feature_group_count=2"),
        ([3, 4, 5], "window={size=1}"),
    ],
)
def test_dimensions_that_do_not_fit_are_an_error(out: list[int], attributes: str) -> None:
    with pytest.raises(HloError, match="HLO line 6"):
        matmul([3, 4, 2], [1, 2, 5], out, attributes)


def test_compiled_products_have_two_mnk_flops() -> None:
    compiled = samples.compiled("matmuls")
    flops = {(item.flops, item.trips, item.kind) for item in compiled.operations if item.flops}
    m, k, n, b = samples.ROWS, samples.INNER, samples.COLUMNS, samples.BATCH
    assert flops == {(2.0 * m * k * n, 5, "matmul"), (2.0 * m * k * n * b, 1, "attention")}
    assert compiled.flops == 2 * m * k * n * (2 * 5 + b)
    assert compiled.matmul_flops == math.prod((2, m, k, n, 10))
