"""How fast the search is, and how that grows: `python tests/benchmarks/search_speed.py`.

Prints, for slices of 64 to 8,960 chips and both costs, the plans considered, those that fit in HBM,
and how those were settled: pruned by a bound that holds for all meshes of their sizes, or priced in
full. Then the seconds that took on one process, and plans a second: considered, settled (pruned or
priced) and priced. Then the cost of one prediction beside that of one settled plan of the same run.
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
    print(
        f"{'slice':>14} {'costs':>8} {'considered':>11} {'fit':>10} {'pruned':>10} {'priced':>7} ",
        end="",
    )
    print(f"{'seconds':>8} {'considered/s':>13} {'settled/s':>10} {'priced/s':>9}")
    found = None
    for name, batch in SLICES:
        machine = parse_machine(name)
        for costs in ("calibrated", "physical"):
            # The first run pays for imports and caches.
            search(model, machine, batch, top=1, costs=costs)
            result = search(model, machine, batch, costs=costs)
            found = found or result
            rates = [many / result.seconds for many in (result.searched, result.fit, result.priced)]
            print(
                f"{name:>14} {costs:>8} {result.searched:>11,} {result.fit:>10,} "
                f"{result.pruned:>10,} {result.priced:>7,} {result.seconds:>8.2f} "
                f"{rates[0]:>13,.0f} {rates[1]:>10,.0f} {rates[2]:>9,.0f}"
            )
    assert found is not None
    plan = found.best.plan
    started = time.perf_counter()
    for _ in range(100):
        predict(plan)
    one_s = (time.perf_counter() - started) / 100
    many_s = found.seconds / found.fit
    print(f"\none plan alone: {one_s * 1e3:.2f} ms; one settled of many: {many_s * 1e6:.2f} us")
    print(f"ratio {one_s / many_s:,.0f}")


if __name__ == "__main__":
    main()
