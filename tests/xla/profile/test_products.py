"""Measured products among planned ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardsim.xla.hlo.matmul import Matmul
from shardsim.xla.profile.products import Products, Sizes, sizes_of

TOKENS, EMBED, WIDE, NARROW = 16384, 2048, 5632, 256
QUERY = Sizes((EMBED, EMBED, TOKENS), 1)
KEY = Sizes((NARROW, EMBED, TOKENS), 1)
MLP = Sizes((EMBED, WIDE, TOKENS), 1)


def product(m: float, k: float, n: float, batch: float = 1) -> Matmul:
    return Matmul(m=m, k=k, n=n, batch=batch)


def test_a_product_and_its_gradients_have_the_same_sizes():
    for one in (product(TOKENS, EMBED, WIDE), product(EMBED, TOKENS, WIDE)):
        assert sizes_of(one) == MLP
        assert Products([QUERY, MLP]).alone(one) == MLP


def test_a_contraction_may_be_split():
    known = Products([MLP])
    assert known.alone(product(EMBED, TOKENS / 4, WIDE, batch=4)) == MLP
    assert known.alone(product(EMBED / 4, TOKENS, WIDE, batch=4)) is None


def test_projections_that_were_made_one_are_one_group():
    known = Products([QUERY, KEY, MLP])
    merged = product(EMBED + 2 * NARROW, EMBED, TOKENS)
    assert known.alone(merged) is None
    known.join(merged)
    found = known.alone(merged)
    assert found is not None
    assert known.group(found) == known.group(QUERY) == known.group(KEY) != known.group(MLP)


def test_what_is_no_sum_joins_nothing():
    known = Products([QUERY, KEY])
    other = product(EMBED + NARROW + 1, EMBED, TOKENS)
    known.join(other)
    assert known.alone(other) is None
    assert known.group(QUERY) != known.group(KEY)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.permutations([0, 1, 2]))
def test_any_products_side_by_side_join(thirds, order):
    planned = [Sizes(tuple(sorted((1000, 3000, third))), 1) for third in thirds]
    known = Products(planned)
    dims = (1000, 3000, sum(thirds))
    merged = product(*(dims[place] for place in order))
    known.join(merged)
    found = known.alone(merged)
    assert found is not None
