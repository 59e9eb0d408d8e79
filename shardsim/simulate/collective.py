"""Running collectives on the links, for every group that meets for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from shardsim.simulate.clock import Clock, Mark
from shardsim.simulate.fluid import Links, Route
from shardsim.simulate.folding import Fold
from shardsim.simulate.traffic import GATHERS, Traffic


@dataclass(frozen=True, kw_only=True)
class Span:
    """One collective of one group class, or one of its legs, for the timeline."""

    name: str
    role: str
    group: int
    start_s: float
    end_s: float
    bytes: float
    leg: str = ""
    ports: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A leg as one group class goes it: data put on a route, then the latency of its hops."""

    route: Route
    unit_bytes: float
    latency_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """What one group class does for a collective: launch, then its stretches, `repeat` times."""

    name: str
    role: str
    group: int
    launch_s: float
    stretches: tuple[Stretch, ...]
    repeat: int = 1
    sent_bytes: float | None = None  # by one member; None: not a collective of its own
    queue: str = ""  # of a group: one after another, in the order in which they start


class _Journey:
    """A course under way."""

    __slots__ = ("course", "done", "left", "number", "place", "sent_s", "start_s", "traveller")

    def __init__(self, traveller: Traveller, course: Course, number: int, done: Mark) -> None:
        self.traveller = traveller
        self.course = course
        self.number = number
        self.done = done
        self.left = course.repeat
        self.place = 0
        self.start_s = self.sent_s = 0.0
        self.begin()

    def begin(self) -> None:
        """Launch, or end."""
        if not self.left:
            self.traveller.running -= 1
            self.done.succeed()
            return
        self.left -= 1
        self.place = 0
        clock = self.traveller.clock
        self.start_s = clock.now
        if self.course.launch_s > 0:
            clock.after(self.course.launch_s, self.depart)
        else:
            self.depart()

    def depart(self) -> None:
        """Put the next stretch's data on its links."""
        traveller, course = self.traveller, self.course
        if self.place == len(course.stretches):
            self.end()
            return
        self.sent_s = traveller.clock.now
        stretch = course.stretches[self.place]
        traveller.links.send(
            stretch.route, stretch.unit_bytes, self.number, course.name, self.arrive
        )

    def arrive(self) -> None:
        """Let the latency of its hops pass."""
        latency_s = self.course.stretches[self.place].latency_s
        if latency_s > 0:
            self.traveller.clock.after(latency_s, self.land)
        else:
            self.land()

    def land(self) -> None:
        """Go on to the next stretch."""
        traveller = self.traveller
        if traveller.watch is not None:
            stretch = self.course.stretches[self.place]
            route = stretch.route
            moved = float((route.carried * stretch.unit_bytes).max(initial=0.0))
            self._tell(self.sent_s, moved, route.name, route.ports)
        self.place += 1
        self.depart()

    def end(self) -> None:
        """Go on to the next time."""
        if self.traveller.watch is not None and self.course.sent_bytes is not None:
            self._tell(self.start_s, self.course.sent_bytes)
        self.begin()

    def _tell(
        self, start_s: float, moved: float, leg: str = "", ports: frozenset[int] = frozenset()
    ) -> None:
        course, traveller = self.course, self.traveller
        assert traveller.watch is not None
        span = Span(
            name=course.name,
            role=course.role,
            group=course.group,
            start_s=start_s,
            end_s=traveller.clock.now,
            bytes=moved,
            leg=leg,
            ports=ports,
        )
        traveller.watch(span)


class Meeting(Mark):
    """The end of a collective; how many members of the group have arrived for it so far."""

    __slots__ = ("arrived", "needed")

    def __init__(self, clock: Clock, needed: int) -> None:
        super().__init__(clock)
        self.arrived = 0
        self.needed = needed


@dataclass
class Traveller:
    """All running collectives."""

    clock: Clock
    folded: Fold
    links: Links
    hop_s: float
    dcn_hop_s: float
    overhead_s: float
    permute_gain: float  # how much faster links are for permutes: these put so much less on them
    watch: Callable[[Span], None] | None = None
    started: int = 0
    running: int = 0
    meetings: dict[tuple[str, int, int], Meeting] = field(default_factory=dict)
    mailboxes: dict[tuple[str, int, str, int], Mark] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._members: dict[tuple[str, int], int] = {}
        self._hops: dict[tuple[str, int, str, str, float], Course] = {}
        self._last: dict[tuple[str, int, str], Mark] = {}  # by queue: the end of what came last

    def meet(self, role: str, group: int, key: int, course: Course) -> Mark:
        """Arrive for collective number `key` of a group; the last to come starts it."""
        place = (role, group, key)
        meeting = self.meetings.get(place)
        if meeting is None:
            meeting = self.meetings[place] = Meeting(self.clock, self._needed(role, group))
        meeting.arrived += 1
        if meeting.arrived == meeting.needed:
            del self.meetings[place]
            self._go(course, meeting)
        return meeting

    def _needed(self, role: str, group: int) -> int:
        key = (role, group)
        if key not in self._members:
            self._members[key] = self.folded.members(role, group)
        return self._members[key]

    def mail(
        self, role: str, group: int, name: str, leg: str, message: int, unit_bytes: float
    ) -> Mark:
        """Send a message from one member of a group to another; returns its arrival."""
        box = self.mailbox(role, group, leg, message)
        stretches = (self._stretch(role, group, leg, unit_bytes, 1.0),)
        self._go(
            Course(
                name=name, role=role, group=group, launch_s=self.overhead_s, stretches=stretches
            ),
            box,
        )
        return box

    def mailbox(self, role: str, group: int, leg: str, message: int) -> Mark:
        """Return the arrival of a message, whether it has been sent yet or not."""
        place = (role, group, leg, message)
        if place not in self.mailboxes:
            self.mailboxes[place] = Mark(self.clock)
        return self.mailboxes[place]

    def _go(self, course: Course, done: Mark) -> None:
        """Start a collective, or let it wait for the one before it in its queue."""
        self.running += 1
        if course.queue:
            place = (course.role, course.group, course.queue)
            before, self._last[place] = self._last.get(place), done
            if before is not None and not before.happened:
                before.then(partial(self._travel, course, done))
                return
        self._travel(course, done)

    def _travel(self, course: Course, done: Mark) -> None:
        self.started += 1
        _Journey(self, course, self.started, done)

    def collective(
        self,
        role: str,
        group: int,
        name: str,
        moved: Traffic,
        messages: float,
        sent: float,
        repeat: int = 1,
    ) -> Course:
        """Return the course of one collective of one group class, `repeat` times in a row."""
        stretches = (
            self._stretch(role, group, move.leg, move.unit_bytes, messages) for move in moved.moves
        )
        return Course(
            name=name,
            role=role,
            group=group,
            launch_s=self.overhead_s * messages * moved.overheads,
            stretches=tuple(stretches),
            repeat=repeat if moved.moves else 0,
            sent_bytes=sent,
        )

    def hop(self, role: str, group: int, name: str, leg: str, unit_bytes: float) -> Course:
        """Return the course of one hop of a ring."""
        key = (role, group, name, leg, unit_bytes)
        course = self._hops.get(key)
        if course is None:
            stretches = (self._stretch(role, group, leg, unit_bytes, 1.0),)
            course = Course(name=name, role=role, group=group, launch_s=0.0, stretches=stretches)
            self._hops[key] = course
        return course

    def _stretch(
        self, role: str, group: int, leg: str, unit_bytes: float, messages: float
    ) -> Stretch:
        route = self.folded.route(role, group, leg)
        hop_s = self.dcn_hop_s if route.dcn else self.hop_s
        if not (route.dcn or leg.startswith(GATHERS)):
            unit_bytes = unit_bytes / self.permute_gain
        return Stretch(route=route, unit_bytes=unit_bytes, latency_s=route.hops * hop_s * messages)
