"""Building lists of ops, each with the call that the emitted program makes for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shardsim.graph.arrays import Array, Dims, Op, weight

TOKENS: Dims = ("batch", "seq")


@dataclass(frozen=True)
class Call:
    """A function of the emitted program (`shardsim.ops`, by name), with what it reads and makes.

    Arrays and weights have the names that they have in the graph, or in a batch; `keeps` are the
    names under which a remat policy keeps the results, or "" where the function names what it keeps
    by itself. `options` are plain data.
    """

    run: str
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    keeps: tuple[str, ...]
    weights: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "run": self.run,
            "ins": list(self.ins),
            "outs": list(self.outs),
            "keeps": list(self.keeps),
            "weights": list(self.weights),
            **dict(self.options),
        }


@dataclass(frozen=True)
class Part:
    """Ops in order, and the calls that run them."""

    ops: tuple[Op, ...]
    calls: tuple[Call, ...]


class Builder:
    """Makes lists of ops."""

    def __init__(self) -> None:
        self.made: list[Op] = []
        self.calls: list[Call] = []

    @property
    def part(self) -> Part:
        """What was made so far."""
        return Part(tuple(self.made), tuple(self.calls))

    def add(self, op: Op) -> Array:
        """Add an op; return what it makes."""
        self.made.append(op)
        return op.out

    def call(
        self,
        run: str,
        ins: Iterable[Array],
        *outs: Array,
        weights: Iterable[Array] = (),
        named: bool = False,
        **options: Any,
    ) -> None:
        """Say what runs the ops that were added last; `named`: it names what it keeps."""
        self.calls.append(
            Call(
                run=run,
                ins=tuple((array.original or array).name for array in ins),
                outs=tuple(array.name for array in outs),
                keeps=tuple("" if named else array.keep for array in outs),
                weights=tuple(array.name for array in weights),
                options=tuple(options.items()),
            )
        )


def stream(name: str, keep: str = "rest", purpose: str = "block") -> Array:
    """Return an array of the residual stream."""
    return Array(name, (*TOKENS, "embed"), stream=True, keep=keep, purpose=purpose)


def width_of(x: Array) -> dict[str, Any]:
    """Return which option of a model is the width of an array's heads, if not `head_dim`."""
    return {"width": "global_head_dim"} if "global_head_dim" in x.dims else {}


def vector(name: str, *dims: str) -> Array:
    """Return a bias, a scale or a probe."""
    return weight(name, *dims, kind="vector")
