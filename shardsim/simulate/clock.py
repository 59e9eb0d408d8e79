"""SimPy's clock with one event for all that is due at an instant, and what can be waited for.

SimPy keeps the time and the queue of instants; what is due at one of them is a list of calls, made
in the order in which they were asked for. Chips that do the same at the same time so cost a call
each, not an event, and nothing here depends on how many instants coincide.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import simpy

TOLD_EVERY = 100  # calls, where somebody wants to know the time

Call = Callable[[], None]


class Mark:
    """Something that will have happened at one moment; who waits for it is called then."""

    __slots__ = ("_clock", "_waiting", "happened")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Call] = []
        self.happened = False

    def then(self, call: Call) -> None:
        """Make a call when it happens, which it has not yet."""
        self._waiting.append(call)

    def succeed(self) -> None:
        """Let it happen now, after all that is due now already."""
        self._clock.after(0.0, self._happen)

    def _happen(self) -> None:
        self.happened = True
        for call in self._waiting:
            call()
        self._waiting.clear()


Steps = Generator[float | Mark, None, None]  # waits for seconds to pass, or for something to happen


class Clock:
    """The time of a simulation in seconds, and what is due when."""

    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.now = 0.0
        self.unfinished = 0  # processes
        self._passed = 0
        self.tell: Callable[[float], None] | None = None  # called with the time, now and then
        self._told = 0
        self._instants: dict[float, list[Call]] = {}

    @property
    def events(self) -> int:
        """Calls asked for so far."""
        return self._passed + sum(map(len, self._instants.values()))

    def after(self, seconds: float, call: Call) -> None:
        """Make a call when `seconds` have passed; with 0, after all that is due now already."""
        time = self.now + seconds
        due = self._instants.get(time)
        if due is None:
            timer = self.env.timeout(seconds)
            assert timer.callbacks is not None
            timer.callbacks.append(self._instant)
            due = self._instants[time] = []
        due.append(call)

    def _instant(self, _: simpy.Event) -> None:
        """Make all calls that are due, also those that are asked for meanwhile."""
        self.now = time = float(self.env.now)
        due = self._instants[time]
        for call in due:
            call()
        self._passed += len(due)
        if self.tell is not None and self._passed - self._told > TOLD_EVERY:
            self._told = self._passed
            self.tell(self.now)
        del self._instants[time]

    def timer(self, seconds: float) -> Mark:
        """Return what happens when `seconds` have passed."""
        mark = Mark(self)
        self.after(seconds, mark.succeed)
        return mark

    def process(self, steps: Steps) -> None:
        """Run `steps` to their end, from now on."""
        self.unfinished += 1
        self.after(0.0, _Process(self, steps).go)

    def run(self) -> None:
        """Run until nothing is due any more."""
        self.env.run()


class _Process:
    """Steps that are under way."""

    __slots__ = ("_clock", "_go", "_steps")

    def __init__(self, clock: Clock, steps: Steps) -> None:
        self._clock = clock
        self._steps = steps
        self._go = self.go  # one bound method for all of its calls

    def go(self) -> None:
        """Go on until there is something to wait for."""
        for wanted in self._steps:
            if isinstance(wanted, Mark):
                if wanted.happened:
                    continue
                wanted.then(self._go)
            else:
                self._clock.after(wanted, self._go)
            return
        self._clock.unfinished -= 1
