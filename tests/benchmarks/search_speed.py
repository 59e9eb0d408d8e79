"""How fast the search prices plans, and how that grows: `python tests/benchmarks/search_speed.py`.

Prints, for slices of 64 to 8,960 chips, the plans considered, priced and fitting, the seconds that
took, and plans per second, on one process; then the cost of one scalar prediction beside that of
one plan in the search, measured in the same run.
"""

from __future__ import annotations

import time

from shardsim.cost.predict import predict
from shardsim.machine import parse_machine
from shardsim.model import load_model
from shardsim.planner.search import search

SLICES = (
    ("v4:4x4x4", 4096),
    ("v4:8x8x8", 32768),
    ("v4:8x8x16", 65536),
    ("v4:16x16x16", 262144),
    ("v5p:16x20x28", 573440),
)


def main() -> None:
    """Run the searches and print one line each."""
    model = load_model("vit-22b")
    print(f"{'slice':>14} {'chips':>6} {'considered':>12} {'priced':>11} {'fit':>11} ", end="")
    print(f"{'seconds':>8} {'considered/s':>13} {'priced/s':>11}")
    best = None
    for name, batch in SLICES:
        machine = parse_machine(name)
        search(
            model, machine, batch, top=1, costs="physical"
        )  # the first run pays for imports and caches
        result = search(model, machine, batch, costs="physical")
        best = best or result
        rates = result.searched / result.seconds, result.priced / result.seconds
        print(
            f"{name:>14} {machine.chips:>6,} {result.searched:>12,} {result.priced:>11,} "
            f"{result.fit:>11,} {result.seconds:>8.2f} {rates[0]:>13,.0f} {rates[1]:>11,.0f}"
        )
    assert best is not None
    plan = best.best.plan
    started = time.perf_counter()
    for _ in range(100):
        predict(plan)
    one_s = (time.perf_counter() - started) / 100
    many_s = best.seconds / best.priced
    print(f"\none plan alone: {one_s * 1e3:.2f} ms; one plan of many: {many_s * 1e6:.2f} us")
    print(f"ratio {one_s / many_s:,.0f}")


if __name__ == "__main__":
    main()
