"""JAX, imported when it is first used: planning reads the files of ops and needs none of it."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """A module that is imported when something in it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


jax: Any = Lazy("jax")
jnp: Any = Lazy("jax.numpy")
lax: Any = Lazy("jax.lax")


def checkpoint_name(x: Any, name: str) -> Any:
    """Name an array for the remat policy (`jax.ad_checkpoint.checkpoint_name`)."""
    return import_module("jax.ad_checkpoint").checkpoint_name(x, name)
