"""Real compiles on a real Dask cluster, one of whose workers is killed on the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cluster import started
from small_step import MODEL, small_plan

from shardsim import executors
from shardsim.executors import cluster
from shardsim.plan import Plan
from shardsim.xla.tpu import Cache, TpuCompiler, service
from shardsim.xla.tpu.evidence import Evidence

pytestmark = pytest.mark.slow

TINY = MODEL | {"layers": 1, "embed": 128, "mlp": 128, "heads": 1, "kv_heads": 1, "classes": 8}
# Every compiling process writes when it begins and when its answer is there.
NOTES = """
import atexit, hashlib, sys
from pathlib import Path

if "shardsim.xla.tpu.worker" in sys.orig_argv:
    folder = Path(sys.orig_argv[-1])
    asked = (folder / "train.py").read_bytes() + (folder / "request.json").read_bytes()
    key = hashlib.sha256(asked).hexdigest()

    def note(what):
        with Path({log!r}).open("a") as log:
            log.write(f"{{what}} {{key}}\\n")

    note("begins")
    atexit.register(lambda: (folder / "result.json").exists() and note("ends"))
"""


def tiny_plans(many: int) -> list[Plan]:
    """Return up to 12 plans that are compiled in a few seconds each."""
    plans = [
        small_plan(machine, model=TINY, batch=batch, optimizer=optimizer)
        for optimizer in ("sgd", "adamw")
        for batch in (16, 32)
        for machine in ("v6e:2x2", "v5e:2x2", "v4:2x2x1")
    ]
    return plans[:many]


def shown(made: service.Compilation) -> dict[str, Any]:
    """Return what a compilation is evidence of."""
    return Evidence(made).to_data()


@pytest.mark.skipif(not service.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.skipif(not executors.find_spec("distributed"), reason="Dask is not installed")
@pytest.mark.parametrize("many", [4, pytest.param(12, marks=pytest.mark.deep)])
def test_a_killed_worker_loses_no_compilation_and_none_is_made_twice(
    many: int, tmp_path: Path
) -> None:
    plans, log = tiny_plans(many), tmp_path / "log"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "sitecustomize.py").write_text(NOTES.format(log=str(log)))
    cache = Cache(tmp_path / "cache")
    found = {}
    with (
        started(tmp_path, (notes,)) as both,
        cluster(both.address) as executor,
        TpuCompiler(executor=executor, cache=cache) as compiler,
    ):
        for index, made in compiler.compile_all(plans):
            found[index] = made
            if len(found) == len(plans) // 2:
                both.workers[0].kill()
    assert sorted(found) == list(range(len(plans)))
    assert all(made.ok and not made.cached for made in found.values())
    notes_of: dict[str, Counter[str]] = {"begins": Counter(), "ends": Counter()}
    for line in log.read_text().splitlines():
        what, key = line.split()
        notes_of[what][key] += 1
    assert set(notes_of["ends"].values()) == {1}
    assert len(notes_of["ends"]) == len(plans)
    # What the killed worker had begun was begun again.
    assert notes_of["begins"].total() <= len(plans) + 1
    # Kept for everybody: nothing is left to compile, and the local pool finds the same.
    with TpuCompiler(cache=cache) as compiler:
        assert all(made.cached for _, made in compiler.compile_all(plans))
    some = plans[::5][: many // 4]
    with TpuCompiler(workers=2) as compiler:
        for index, made in compiler.compile_all(some):
            assert shown(made) == shown(found[5 * index])
