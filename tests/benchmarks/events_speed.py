"""How fast the event simulation is; run as a script, with nothing else on the machine.

    python tests/benchmarks/events_speed.py [--quick]

Prints one ViT-22B step on 1,024 chips (48 layers, forward, backward, optimizer) folded, with one
chip 10 % slow, with a dead link, and unfolded; 65,536 chips folded; how time grows from 64 to
8,960 chips; and SimPy's own ceiling on this machine in the same run.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from typing import Any

import simpy

from shardsim.machine import Machine
from shardsim.plan import MeshAxis, Plan, load_plan
from shardsim.simulate import simulate_plan


def ceiling(processes: int, events: int = 300_000) -> float:
    """Return timeouts per second of `processes` SimPy processes that do nothing else."""
    env = simpy.Environment()

    def run(count: int) -> Any:
        for _ in range(count):
            yield env.timeout(1.0)

    for _ in range(processes):
        env.process(run(events // processes))
    began = time.perf_counter()
    env.run()
    return events / (time.perf_counter() - began)


def on(plan: Plan, shape: tuple[int, int, int], mesh: dict[str, dict[str, int]]) -> Plan:
    """Return `plan` on a slice of `shape`, 64 sequences a chip."""
    machine = Machine(chip=plan.machine.chip, shape=shape)
    axes = tuple(
        MeshAxis(name=name, size=math.prod(torus.values()), torus=torus)
        for name, torus in mesh.items()
    )
    batch = tuple(name for name in mesh if name != "model")
    return dataclasses.replace(
        plan,
        name="x".join(map(str, shape)),
        machine=machine,
        mesh=axes,
        batch=64 * machine.chips,
        activations={**plan.activations, "batch": batch},
    )


def show(title: str, plan: Plan, **options: Any) -> Any:
    """Simulate, print one line."""
    began, began_cpu = time.perf_counter(), time.process_time()
    found = simulate_plan(plan, **options)
    seen: Any = found.events
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    print(
        f"{title:34} {plan.machine.chips:7,} chips {seconds:7.2f} s ({cpu:5.2f} s of a core) "
        f"{seen.events:11,} events "
        f"{seen.events / seconds / 1e3:7.0f} k/s   classes: {seen.classes['devices']} chips, "
        f"{seen.classes['links']} links   step {found.step_time_s:.4f} s, "
        f"MFU {100 * found.mfu:.2f} %",
        flush=True,
    )
    return found


def main() -> None:
    """Print the table."""
    plan = load_plan("vit-22b-published-tp8")
    simulate_plan(plan)  # imports and first calls
    for processes in (1, 1024):
        rate = ceiling(processes) / 1e3
        print(f"SimPy's own ceiling, {processes} processes: {rate:.0f} k events/s")
    folded = show("ViT-22B step, folded", plan)
    show("one chip 10 % slow", plan, straggler=(0, 1.1))
    show("a dead link of the weights' axis", plan, dead_link=(0, 0))
    show("a dead link of the model axis", plan, dead_link=(0, 2))
    large = {"data": {"x": 4, "z": 16}, "fsdp": {"x": 8, "y": 4, "z": 4}, "model": {"y": 8}}
    show("65,536 chips, folded", on(plan, (32, 32, 64), large))
    for shape in ((4, 4, 4), (4, 8, 8), (8, 8, 16), (16, 8, 16), (16, 8, 32), (16, 20, 28)):
        x, y, z = shape
        model = 8 if y % 8 == 0 else 4
        mesh = {"data": {"y": y // model}} if y > model else {}
        mesh |= {"fsdp": {"x": x, "z": z}, "model": {"y": model}}
        show("growth, folded", on(plan, shape, mesh))
    if "--quick" not in sys.argv:
        unfolded = show("ViT-22B step, every chip for itself", plan, unfold=True)
        print(f"folded and unfolded differ by {unfolded.step_time_s - folded.step_time_s:g} s")


if __name__ == "__main__":
    main()
