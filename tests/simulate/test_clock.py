"""The clock: the same order as SimPy's own events, one instant after another."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from shardsim.simulate.clock import Clock, Mark, Steps

# What a process does, one after the other: let seconds pass, open a gate, wait at a gate.
Deed = tuple[str, float]
DEEDS = st.one_of(
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0])),
    st.tuples(st.sampled_from(["open", "wait"]), st.integers(0, 3).map(float)),
)
Log = list[tuple[float, int, int]]  # when which process did its which deed


def with_simpy(scripts: list[list[Deed]]) -> Log:
    env = simpy.Environment()
    gates = [env.event() for _ in range(4)]
    log: Log = []

    def run(number: int, script: list[Deed]) -> Generator[simpy.Event, Any, None]:
        for place, (what, value) in enumerate(script):
            if what == "pass":
                yield env.timeout(value)
            elif what == "wait":
                yield gates[int(value)]
            elif not gates[int(value)].triggered:
                gates[int(value)].succeed()
            log.append((float(env.now), number, place))

    for number, script in enumerate(scripts):
        env.process(run(number, script))
    env.run()
    return log


def with_clock(scripts: list[list[Deed]]) -> tuple[Log, int]:
    clock = Clock()
    gates = [Mark(clock) for _ in range(4)]
    opened: set[int] = set()
    log: Log = []

    def run(number: int, script: list[Deed]) -> Steps:
        for place, (what, value) in enumerate(script):
            if what == "pass":
                yield value
            elif what == "wait":
                yield gates[int(value)]
            elif int(value) not in opened:
                opened.add(int(value))
                gates[int(value)].succeed()
            log.append((clock.now, number, place))

    for number, script in enumerate(scripts):
        clock.process(run(number, script))
    clock.run()
    return log, clock.unfinished


@given(st.lists(st.lists(DEEDS, max_size=8), min_size=1, max_size=5))
def test_everything_happens_when_and_in_the_order_in_which_simpy_has_it(
    scripts: list[list[Deed]],
) -> None:
    log, unfinished = with_clock(scripts)
    assert log == with_simpy(scripts)
    done = {number for _, number, place in log if place == len(scripts[number]) - 1}
    assert unfinished == sum(1 for number, script in enumerate(scripts) if script) - len(done)


def test_a_timer_happens_once_and_who_comes_later_does_not_wait() -> None:
    clock = Clock()
    timer = clock.timer(2.0)
    seen: list[float] = []

    def late() -> Steps:
        yield 3.0
        assert timer.happened
        yield timer
        seen.append(clock.now)

    timer.then(lambda: seen.append(clock.now))
    clock.process(late())
    clock.run()
    assert seen == [2.0, 3.0]


def test_all_that_is_due_at_an_instant_is_one_event_of_simpy() -> None:
    clock = Clock()
    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    for _ in range(100):
        clock.after(1.0, step)
    clock.env.step()
    assert (steps, clock.events, clock.now) == (100, 100, 1.0)
    assert clock.env.peek() == float("inf")


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="delay"):
        Clock().after(-1.0, lambda: None)
