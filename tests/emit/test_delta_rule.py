"""The gated delta rule in chunks against the rule itself, token by token."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.jax


@pytest.mark.parametrize("alike", [False, True])
def test_chunks_give_what_a_recurrence_gives(alike: bool) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from shardsim.ops.delta import chunked_rule, unit

    def rule(q: Any, k: Any, v: Any, beta: Any, decay: Any) -> Any:
        def step(state: Any, token: Any) -> tuple[Any, Any]:
            q, k, v, beta, decay = token
            state = state * jnp.exp(decay)[..., None, None]
            new = beta[..., None] * (v - jnp.einsum("bhd,bhde->bhe", k, state))
            state = state + k[..., None] * new[..., None, :]
            return state, jnp.einsum("bhd,bhde->bhe", q, state)

        each = tuple(jnp.moveaxis(x, 1, 0) for x in (q * q.shape[-1] ** -0.5, k, v, beta, decay))
        first = jnp.zeros((2, 4, k.shape[-1], v.shape[-1]))
        return jnp.moveaxis(jax.lax.scan(step, first, each)[1], 0, 1)

    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.standard_normal((2, 128, 4, *shape)), jnp.float32)

    # Keys that are alike, writes that nothing decays: the triangle is far from diagonal.
    q, k, v = unit(normal(16)), unit(normal(16) + 5.0 * alike), normal(24)
    beta, decay = jax.nn.sigmoid(normal() + 3.0 * alike), -jnp.exp(normal() - 2.0 * alike) / 4.0
    given = (q, k, v, beta, decay)

    def both(function: Any) -> Any:
        gradients = jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=range(5))
        return jax.jit(lambda *x: (function(*x), *gradients(*x)))(*given)

    mine = both(lambda *x: chunked_rule(*x, 32))
    for one, other in zip(mine, both(rule), strict=True):
        assert float(jnp.max(jnp.abs(one - other))) <= 1e-5 * max(
            1.0, float(jnp.max(jnp.abs(other)))
        )
