"""What chips do in a step, as data: operations in a row, moves, copies and waits, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from shardsim.cost.task_times import WorkTime
from shardsim.program.schedule import When


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """One move of a schedule, as numbers."""

    name: str
    kind: str
    role: str
    bytes: float
    messages: float
    stage: str  # as `Move.stage`; of a hop round a ring, its leg
    repeat: int
    moves: str  # "parameters" or "activations"
    sent_bytes: float  # by one member, once
    alone_s: float  # what the closed form says, once
    shifts: tuple[int, ...] = ()  # of a compiled permute: members passed over, negative: back
    queue: str = ""  # those of one queue of a group run one after another; "": with all others


@dataclass(frozen=True, kw_only=True)
class Run:
    """Operations in a row on the compute stream."""

    time: WorkTime  # of all of them
    parts: tuple[tuple[str, float], ...]  # name and seconds


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Run a move and wait for it."""

    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Start a move."""

    spec: Spec
    when: When


@dataclass(frozen=True, kw_only=True)
class HbmCopy:
    """Start a copy between memories, which takes HBM as it is spared."""

    name: str
    hbm_s: float
    when: When


@dataclass(frozen=True, kw_only=True)
class HostCopy:
    """Start a copy to or from the host, one after another."""

    name: str
    host_s: float
    when: When


@dataclass(frozen=True, kw_only=True)
class End:
    """Wait for what was started, if anything was."""

    name: str
    when: When


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Operations that run so many times in a row."""

    times: int
    ops: tuple[Op, ...]


@dataclass(frozen=True, kw_only=True)
class Send:
    """Pass a microbatch on to another pipeline stage, and wait until it is there."""

    spec: Spec
    leg: str


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Wait for a microbatch from another pipeline stage."""

    leg: str  # the sender's


Op = Run | Sync | Launch | HbmCopy | HostCopy | End | Rounds | Send | Receive
