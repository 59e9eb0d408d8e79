"""What the tasks of a single Schedule take on one device, for whoever replays it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shardsim.cost.collectives import collective_s, move_s, sent_bytes
from shardsim.cost.costs import Costs
from shardsim.cost.meshlinks import MeshLinks, RoleLinks, Route
from shardsim.plan.layout import Number
from shardsim.program.schedule import Copy, Move, Work


@dataclass(frozen=True, kw_only=True)
class WorkTime:
    """Seconds of operations on the compute stream, by what takes them."""

    compute_s: float = 0.0
    hbm_bound_s: float = 0.0
    overhead_s: float = 0.0
    spare_s: float = 0.0  # of their sum: in which they leave HBM to others

    @property
    def total_s(self) -> float:
        """Seconds of all of them."""
        return self.compute_s + self.hbm_bound_s + self.overhead_s

    def __add__(self, other: WorkTime) -> WorkTime:
        return WorkTime(
            compute_s=self.compute_s + other.compute_s,
            hbm_bound_s=self.hbm_bound_s + other.hbm_bound_s,
            overhead_s=self.overhead_s + other.overhead_s,
            spare_s=self.spare_s + other.spare_s,
        )


class TaskTimes:
    """Times of single tasks on a machine whose other parts are idle."""

    def __init__(self, costs: Costs, links: MeshLinks | RoleLinks) -> None:
        self.costs = costs
        self.links = links
        self._alone: dict[int, tuple[float, Move]] = {}  # by identity

    def work(self, task: Work) -> WorkTime:
        """Return the time of a compute task; all of its HBM traffic is HBM's own time."""
        cost = self.costs.operation(task)
        own_s = float(task.hbm_bytes * task.count) / self.costs.hbm_bytes_per_s
        return WorkTime(
            compute_s=float(cost.unit_s * task.count),
            hbm_bound_s=float(cost.memory_s * task.count),
            overhead_s=float(cost.overhead_s * task.count),
            spare_s=max(float(cost.total_s * task.count) - own_s, 0.0),
        )

    def route(self, task: Move) -> Route:
        """Return the links of a move."""
        return self.links.route_of(task)

    def alone_s(self, task: Move) -> float:
        """Return what a move takes on free links."""
        if id(task) not in self._alone:
            self._alone[id(task)] = float(self._once_s(task) * task.count), task
        return self._alone[id(task)][0]

    def _once_s(self, task: Move) -> Number:
        route = self.route(task)
        if task.role:
            return move_s(route.group, task)
        # Each link carries the blocks of all members that a permute passes over.
        amount = task.bytes * route.hops if task.kind == "permute" else task.bytes
        return collective_s(task.kind, route.group, amount, task.messages)

    def sent_bytes(self, task: Move) -> float:
        """Return the bytes that one member sends in one of a task's moves."""
        return float(sent_bytes(task.kind, self.route(task).group, task.bytes, task.stage))

    def hbm_s(self, task: Copy) -> float:
        """Return the seconds of HBM that a copy needs."""
        return float(task.hbm_bytes) / self.costs.hbm_bytes_per_s

    def host_s(self, task: Copy) -> float:
        """Return the seconds of the link to the host that a copy needs."""
        return float(task.host_bytes) / self.costs.host_bytes_per_s


class Copies:
    """Copies between memories of one device: one after another, with HBM as it is spared."""

    def __init__(self) -> None:
        self.queue: deque[tuple[str, float]] = deque()  # name, seconds of HBM left
        self.moved: set[str] = set()  # those that ended and were not awaited yet

    def add(self, name: str, hbm_s: float) -> None:
        """Put a copy behind the others."""
        self.queue.append((name, hbm_s))
        self.drain(0.0)

    def __contains__(self, name: str) -> bool:
        return name in self.moved or any(name == other for other, _ in self.queue)

    def finish(self, name: str) -> float:
        """End `name` and all before it; return the seconds of HBM that this took.

        They are taken out one by one: time that is summed and passed would leave a rest of
        rounding.
        """
        left = 0.0
        while name not in self.moved:
            other, seconds = self.queue.popleft()
            left += seconds
            self.moved.add(other)
        return left

    def drain(self, seconds: float) -> None:
        """Let the copies have HBM for so long."""
        queue = self.queue
        while queue and queue[0][1] <= seconds * (1 + 1e-12):
            name, took = queue.popleft()
            seconds -= took
            self.moved.add(name)
        if queue and seconds > 0:
            queue[0] = (queue[0][0], queue[0][1] - seconds)
