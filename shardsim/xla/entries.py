"""One collective of a compiled program, whichever reader found it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One collective instruction of a compiled program."""

    kind: str
    mesh_axes: tuple[str, ...]
    sent_bytes: float  # by one device, each time
    count: int  # times in one run of the program
    op_name: str  # where in the source it comes from
    # What only the reader of scheduled programs (shardsim.xla.hlo) says.
    array_bytes: float = 0.0  # the whole array, as `program.tasks.Collective.bytes`
    parts: tuple[tuple[str, int, int], ...] = ()  # axes taken in part: name, members, stride
    asynchronous: bool = False  # whether something may run meanwhile
    algorithm: str = ""  # the compiler's: "RotatedPincerEmitter StrategyND"
    source: str = ""  # "explicit.py:67 Explicit.whole_weight"
    origin: str = ""  # what an all-reduce stands for: "all-gather", "reduce-scatter"
    block: str = ""
    name: str = ""  # of the instruction


def sent_bytes(kind: str, array_bytes: float, devices: int) -> float:
    """Return what one device sends for a collective of a whole array of `array_bytes`.

    >>> sent_bytes("all-reduce", 1024, 4)
    1536.0
    """
    if kind in ("permute", "broadcast"):
        return float(array_bytes)
    share = (devices - 1) / devices
    return array_bytes * share * (2.0 if kind == "all-reduce" else 1.0)
