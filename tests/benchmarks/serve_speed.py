"""How fast the page answers: `python tests/benchmarks/serve_speed.py [PLAN ...]`.

Prints, for some shipped plans, the milliseconds of one answer over HTTP after a change that was
not asked before (median and the slowest of 40), alone and beside a pinned plan; those of the
processor (of both ends), which another's work on the machine does not change; and their ratio to
one prediction in the same process.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import threading
import time
from typing import Any

from shardsim.cost.predict import predict
from shardsim.plan import load_plan
from shardsim.planner.changes import changed
from shardsim.serve.desk import Desk
from shardsim.serve.server import PageServer

PLANS = ("vit-22b-published-tp8", "palm-540b-published-two-pods", "maxtext-32b-published-v5p-1x64")
CHANGES = 40
TARGET_MS = 200


def main() -> None:
    """Ask and print one line for each plan."""
    names = sys.argv[1:] or PLANS
    server = PageServer(Desk({name: load_plan(name) for name in names}), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    heads = f"{'alone':>14} {'pinned':>14} {'processor':>10} predict   ratio  under {TARGET_MS} ms"
    print(f"{'plan':>32} {heads}")
    for name in names:
        plan = load_plan(name)
        batches = [plan.batch * number for number in range(2, CHANGES + 2)]
        alone, _ = _asked(server, name, batches, None)
        others = [2 * one + plan.batch for one in batches]
        both, busy_ms = _asked(server, name, others, {"plan": name})
        own = []
        for batch in batches:
            began = time.process_time()
            predict(changed(plan, {"batch": batch}))
            own.append(1e3 * (time.process_time() - began))
        one_ms = statistics.median(own)
        share = sum(took < TARGET_MS for took in (*alone, *both)) / (2 * CHANGES)
        cells = [f"{statistics.median(took):6.0f} {max(took):6.0f}" for took in (alone, both)]
        print(
            f"{name:>32} {cells[0]:>14} {cells[1]:>14} {busy_ms:10.0f} {one_ms:7.0f} "
            f"{busy_ms / one_ms:7.2f} "
            f"{100 * share:7.0f} %"
        )


def _asked(
    server: PageServer, name: str, batches: list[int], pinned: Any
) -> tuple[list[float], float]:
    """Return the milliseconds of each answer, and the median of those of the processor."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port)
    found, busy = [], []
    for batch in batches:
        body = json.dumps({"plan": name, "set": [f"batch={batch}"], "pinned": pinned})
        began, worked = time.perf_counter(), time.process_time()
        link.request("POST", "/api/predict", body, {"Content-Type": "application/json"})
        answer = link.getresponse()
        text = answer.read()
        found.append(1e3 * (time.perf_counter() - began))
        busy.append(1e3 * (time.process_time() - worked))
        assert answer.status == 200, text
    return found, statistics.median(busy)


if __name__ == "__main__":
    main()
