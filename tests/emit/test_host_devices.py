"""The process with host devices: enough threads for its collectives, and why it ended if it did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardsim.errors import ShardsimError
from shardsim.xla.host import HostDevices, host_environment

# Ends itself as XLA does when the members of a collective do not come.
DYING = """
import os, sys
sys.stderr.write("I0000 00:00:1.2 7 cpu_client.cc:1] started\\n")
sys.stderr.write("E0000 00:00:1.2 7 rendezvous.cc:99] may be stuck\\n")
sys.stderr.write("F0000 00:00:1.2 7 rendezvous.cc:127] Termination timeout exceeded\\n")
sys.stderr.write("*** Check failure stack trace: ***\\n")
sys.stderr.flush()
os.kill(os.getpid(), 6)
"""


def made_of(
    program: str, folder: Path, patch: pytest.MonkeyPatch, devices: int = 2, flags: str = ""
) -> HostDevices:
    (folder / "made_up_worker.py").write_text(program)
    patch.syspath_prepend(str(folder))
    return HostDevices(devices, module="made_up_worker", flags=flags)


def test_a_process_that_is_killed_says_by_what_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made_of(DYING, tmp_path, monkeypatch) as host, pytest.raises(ShardsimError) as raised:
        host.ask({})
    assert str(raised.value) == (
        "the process with host devices was killed by signal 6 (Aborted): "
        "Termination timeout exceeded"
    )


def test_a_process_that_fails_says_its_last_words_and_names_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "raise SystemExit('no such plan')"
    with (
        made_of(failing, tmp_path, monkeypatch) as host,
        pytest.raises(ShardsimError, match=r"ended with exit status 1: no such plan$"),
    ):
        host.ask({})
    monkeypatch.setattr("shardsim.xla.child.find_spec", lambda name: None)
    with (
        made_of(failing, tmp_path, monkeypatch) as host,
        pytest.raises(ShardsimError, match=r"needs jax and optax: pip install 'shardsim\[jax\]'$"),
    ):
        host.ask({})


COUNT = """
import json, os, sys
from pathlib import Path
if len(sys.argv) > 1:
    from shardsim.emit.runtime.host import use_host_devices
    use_host_devices(int(sys.argv[1]))
import jax
devices = len(jax.devices())
names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
print(json.dumps({"devices": devices, "threads": sum("XLA" in name for name in names)}), flush=True)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted on Linux")
def test_there_are_threads_for_several_collectives_of_every_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA's pool of operations is as large as it is told, not as the machine has cores."""
    monkeypatch.setenv("NPROC", "1")
    with made_of(COUNT, tmp_path, monkeypatch) as host:
        answer = host.ask({})
    assert answer == {"devices": 2, "threads": 2 * 8}
    code = [sys.executable, "-c", COUNT, "3"]  # as an exported file makes its own
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    assert '"devices": 3, "threads": 24' in done.stdout
    assert int(host_environment(8)["PJRT_NPROC"]) >= 64


# Permutes of all devices beside sums over some, none waiting for another, all on one core.
INDEPENDENT = """
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, jax.numpy as jnp, numpy as np
from jax import P, lax
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
ring = [(k, (k + 1) % 8) for k in range(8)]
def step(x):
    total = 0.0
    for i in range(12):
        y = (x * (i + 1.0)) @ x.T
        total += lax.psum(y, "b").sum() + lax.psum(y + 1, "a").sum()
        total += lax.ppermute(y, ("a", "b"), ring).sum()
    return x + total * 1e-9
split = P(("a", "b"))
step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split))
x = jnp.ones((8 * 64, 64))
for _ in range(150):
    x = step(x)
x.block_until_ready()
print('{"done": 150}', flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="one core only on Linux")
def test_independent_collectives_on_one_core_do_not_wait_for_each_other_s_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With XLA's own number of threads this stops, and is ended."""
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=8"
    with made_of(INDEPENDENT, tmp_path, monkeypatch, devices=8, flags=flags) as host:
        assert host.ask({}) == {"done": 150}
