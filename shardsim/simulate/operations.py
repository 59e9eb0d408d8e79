"""What chips do in a step, as data: work, collectives, waits, in units and scripts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations in a row on the chip's compute stream."""

    parts: tuple[tuple[str, float], ...]  # name and seconds

    @property
    def time_s(self) -> float:
        """Seconds of all of them."""
        return sum(seconds for _, seconds in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """One collective of the program, as numbers."""

    name: str
    kind: str
    role: str
    bytes: float
    messages: float
    stage: str
    repeat: int
    moves: str  # "parameters" or "activations"
    sent_bytes: float  # by one member, once
    alone_s: float  # what the closed form says, once
    shifts: tuple[int, ...] = ()  # of a compiled permute: members passed over, negative: back


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Run a collective and wait for it."""

    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start a collective; it is awaited at the end of the next layer."""

    spec: Spec


@dataclass(frozen=True, kw_only=True)
class Host:
    """Start a transfer to or from the host, awaited at the end of the layer."""

    name: str
    time_s: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A collective cut into hops beside blocks of matmuls.

    `rounds` rounds of `blocks` blocks each, a hop beside every round but, in one direction, the
    last. In both directions a gather has one hop before, a scatter one after.
    """

    spec: Spec
    block_s: float
    blocks: int
    rounds: int
    leg: str
    hop_bytes: float
    before: bool
    after: bool
    beside_last: bool
    whole_s: float  # the matmuls, not cut
    partners: str


@dataclass(frozen=True, kw_only=True)
class Send:
    """Pass a microbatch on to another pipeline stage, and wait until it is there."""

    spec: Spec
    leg: str


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Wait for a microbatch from another pipeline stage."""

    leg: str  # the sender's


Op = Work | Sync | Start | Host | Ring | Send | Receive


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One trip through a block."""

    name: str
    phase: str
    ops: tuple[Op, ...]
    prefetch: tuple[Spec, ...] = ()  # needed when it starts, gathered ahead
    reduce: tuple[Spec, ...] = ()  # started when its gradients are complete


@dataclass(frozen=True, kw_only=True)
class Step:
    """One unit in the order of a stage."""

    unit: int  # into `Schedule.units`
    message: int = 0  # what a `Send` or `Receive` in it is about


@dataclass(frozen=True, kw_only=True)
class Script:
    """What the chips of one pipeline stage run in order, and when each unit's gathers start."""

    steps: tuple[Step, ...]
    issue: dict[int, tuple[int, ...]]  # place in `steps` -> places whose gathers start there


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The units of a step, and the script of every pipeline stage: one where there are none."""

    units: tuple[Unit, ...]
    scripts: tuple[Script, ...]
    legs: dict[str, set[str]] = field(default_factory=dict)  # by role: kind@stage, ring legs
