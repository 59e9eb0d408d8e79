"""How fast the page answers: `python tests/benchmarks/serve_speed.py [PLAN ...]`.

Prints, for some shipped plans, the milliseconds of one answer over HTTP after a change that was
not asked before (median and the slowest of 40), alone and beside a pinned plan, and the same as a
ratio to one prediction in the same process.
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
    print(f"{'plan':>32} {'alone':>14} {'pinned':>14}  predict   ratio  under {TARGET_MS} ms")
    for name in names:
        plan = load_plan(name)
        batches = [plan.batch * number for number in range(2, CHANGES + 2)]
        alone = _asked(server, name, batches, None)
        both = _asked(server, name, [2 * one + plan.batch for one in batches], {"plan": name})
        own = []
        for batch in batches:
            began = time.perf_counter()
            predict(changed(plan, {"batch": batch}))
            own.append(1e3 * (time.perf_counter() - began))
        one_ms, middle = statistics.median(own), statistics.median(both)
        share = sum(took < TARGET_MS for took in (*alone, *both)) / (2 * CHANGES)
        cells = [f"{statistics.median(took):6.0f} {max(took):6.0f}" for took in (alone, both)]
        print(
            f"{name:>32} {cells[0]:>14} {cells[1]:>14} {one_ms:8.0f} {middle / one_ms:7.2f} "
            f"{100 * share:7.0f} %"
        )


def _asked(server: PageServer, name: str, batches: list[int], pinned: Any) -> list[float]:
    """Return the milliseconds of each answer."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port)
    found = []
    for batch in batches:
        body = json.dumps({"plan": name, "set": [f"batch={batch}"], "pinned": pinned})
        began = time.perf_counter()
        link.request("POST", "/api/predict", body, {"Content-Type": "application/json"})
        answer = link.getresponse()
        text = answer.read()
        found.append(1e3 * (time.perf_counter() - began))
        assert answer.status == 200, text
    return found


if __name__ == "__main__":
    main()
