"""Calls through executors: all outcomes, one line on what fails, and nothing lost on the way."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, slow_square, started
from said import shardsim

from shardsim import executors
from shardsim.cost.predict import predict
from shardsim.errors import PlanError, ShardsimError
from shardsim.executors import cluster, executor_of, outcomes
from shardsim.plan import load_plan
from shardsim.planner.search import search
from shardsim.planner.whatif import sweep
from shardsim.simulate import simulate_plan

TP8 = "vit-22b-published-tp8"
VARY = [("microbatches", [1, 2, 3]), ("remat", ["full", "dots"])]  # 3 does not divide the batch
needs_dask = pytest.mark.skipif(
    not executors.find_spec("distributed"), reason="Dask is not installed"
)


def test_every_call_has_one_outcome_at_its_place() -> None:
    with ThreadPoolExecutor(3) as pool:
        found = [*outcomes(pool, divmod, [(n, 7) for n in range(50)])]
    assert sorted(found) == [(n, divmod(n, 7)) for n in range(50)]


def test_a_mistake_is_told_as_it_is_and_a_failure_in_one_line() -> None:
    def fail(error: Exception) -> None:
        raise error

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(PlanError, match=r"^this is wrong$"):
            list(outcomes(pool, fail, [(PlanError("this is wrong"),)]))
        with pytest.raises(ShardsimError, match=r"failed \(OSError: gone for good\)$"):
            list(outcomes(pool, fail, [(OSError("gone\nfor good"),)]))


def test_who_stops_reading_cancels_what_has_not_begun() -> None:
    go, begun = threading.Event(), []

    def wait(number: int) -> int:
        begun.append(number)
        if number:
            go.wait(60)
        return number

    with ThreadPoolExecutor(1) as pool:
        found = outcomes(pool, wait, [(n,) for n in range(9)])
        assert next(found) == (0, 0)
        found.close()
        go.set()
    assert len(begun) <= 2


def test_while_nothing_is_done_it_is_told_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "TELL_S", 0.01)
    told: list[int] = []
    go = threading.Event()

    def waiting(seconds: float, left: int) -> None:
        told.append(left)
        go.set()

    with ThreadPoolExecutor(1) as pool:
        assert [*outcomes(pool, go.wait, [(60,)], waiting)] == [(0, True)]
    assert set(told) == {1}


def rows(found: Iterator[Any]) -> list[Any]:
    return [(changes, item and item.step_time_s, why) for changes, item, why in found]


@pytest.mark.parametrize("run", [predict, simulate_plan])
def test_a_sweep_is_the_same_wherever_it_runs(run: Any) -> None:
    plan = load_plan(TP8)
    vary = VARY if run is predict else VARY[:1]
    here = rows(sweep(plan, vary, run=run))
    with ThreadPoolExecutor(2) as pool:
        assert rows(sweep(plan, vary, run=run, executor=pool)) == here
    assert [bool(why) for _, _, why in here] == [
        changes["microbatches"] == 3 for changes, *_ in here
    ]


@pytest.mark.parametrize("pooled", [False, True])
def test_an_interrupted_sweep_keeps_what_is_done(pooled: bool) -> None:
    class Interrupted(ThreadPoolExecutor):
        """As if the third call were interrupted."""

        def submit(self, *call: Any) -> Future[Any]:
            future: Future[Any] = Future()
            try:
                future.set_result(call[0](*call[1:]))
            except KeyboardInterrupt as error:
                future.set_exception(error)
            return future

    seen: list[Any] = []

    def run(plan: Any, implementation: str | None) -> Any:
        seen.append(plan)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return predict(plan)

    vary = [("microbatches", [1, 2, 4, 8])]
    with Interrupted(1) as pool:
        found = list(sweep(load_plan(TP8), vary, run=run, executor=pool if pooled else None))
    left = {changes["microbatches"] for changes, _, _ in found}
    assert left <= {1, 2, 8}
    assert pooled or left == {1, 2}


def test_a_simulated_step_travels_without_its_engine() -> None:
    found = simulate_plan(load_plan(TP8))
    again = pickle.loads(pickle.dumps(found))
    assert again.to_data() == found.to_data()
    assert (again.events.engine, found.events.engine is None) == (None, False)


def test_without_dask_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    done = shardsim("sweep", TP8, "--vary", "batch=1", "--scheduler", "x:1")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: --scheduler needs Dask: pip install 'shardsim[cluster]'\n"


@pytest.mark.slow
@needs_dask
@pytest.mark.parametrize("address", ["nowhere", "", "post://office:1", "tcp://127.0.0.1:9"])
def test_a_bad_address_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(executors, "CONNECT_S", 0.5)
    done = shardsim("sweep", TP8, "--vary", "batch=1", "--scheduler", address)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --scheduler {address}: no Dask scheduler there (")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Cluster]:
    with started(tmp_path) as made:
        yield made


@pytest.mark.slow
@needs_dask
def test_a_killed_worker_loses_no_call(two_workers: Cluster) -> None:
    found: dict[int, tuple[int, int]] = {}
    with cluster(two_workers.address) as executor:
        for index, result in outcomes(executor, slow_square, [(n,) for n in range(12)]):
            found[index] = result
            if len(found) == 4:
                two_workers.workers[0].kill()
    assert {n: square for n, (square, _) in found.items()} == {n: n * n for n in range(12)}
    assert two_workers.workers[1].pid in {pid for _, pid in found.values()}


@pytest.mark.slow
@needs_dask
def test_slices_are_searched_and_plans_simulated_on_a_cluster(two_workers: Cluster) -> None:
    words = ["sweep", TP8, "--vary", "microbatches=1,2", "--fidelity", "events"]
    here = shardsim(*words)
    there = shardsim(*words, "--scheduler", two_workers.address)
    assert there.exit_code == 0
    assert there.stdout == here.stdout
    names = ["v5e:2x2", "v4:2x2x1"]
    one = search("vit-b-16", names, 256, top=5)
    with executor_of(1, two_workers.address) as executor:
        other = search("vit-b-16", names, 256, top=5, executor=executor)
    assert [item.plan for item in other.predictions] == [item.plan for item in one.predictions]
    assert (other.searched, other.fit, other.bound) == (one.searched, one.fit, one.bound)


@pytest.mark.slow
@needs_dask
def test_a_scheduler_that_goes_is_one_line(two_workers: Cluster) -> None:
    def left() -> None:
        with cluster(two_workers.address) as executor:
            for _ in outcomes(executor, slow_square, [(n,) for n in range(12)]):
                two_workers.scheduler.kill()

    begun = time.monotonic()
    with pytest.raises(ShardsimError, match=r"127\.0\.0\.1:\d+: the Dask scheduler is gone$"):
        left()
    assert time.monotonic() - begun < 60
