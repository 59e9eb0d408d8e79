"""The page's server, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shardsim.plan import load_plan
from shardsim.serve.desk import Desk
from shardsim.serve.server import PageServer

PLAN = "vit-22b-published-tp8"


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer(Desk({PLAN: load_plan(PLAN)}), 0) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()
