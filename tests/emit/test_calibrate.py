"""Measured figures as a hardware file, and the plans that are timed on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsim.cost.predict import predict
from shardsim.errors import ShardsimError
from shardsim.machine import Machine
from shardsim.machine.catalog import load_chip_file
from shardsim.xla import HostDevices
from shardsim.xla.calibrate import hardware_file, measured_plans, rank_correlation


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Eight devices of 10 GFLOP/s, 1 GB/s links and 20 us to start a collective."""
    matmuls = {64: 2 * 64**3 / 10e9 + 1e-6, 512: 2 * 512**3 / 10e9}
    gathers = {n: 20e-6 + 4 * n * 7 / 8 / 1e9 for n in (2**14, 2**17, 2**20)}
    text = hardware_file("a test", 8, matmuls, gathers, stream_s=0.01, vector_s=1e-4)
    path = tmp_path / "host.yaml"
    path.write_text(text)
    return Machine(chip=load_chip_file(path), shape=(8,))


def test_measured_times_become_rates(machine: Machine) -> None:
    chip = machine.chip
    assert chip.peak("bf16") == pytest.approx(10e9)
    assert chip.link_bytes_per_s == pytest.approx(1e9)
    assert chip.collective_overhead_s == pytest.approx(20e-6)
    assert chip.op_overhead_s == pytest.approx(1e-6)
    assert "a test" in chip.figures["link_bytes_per_s"]["source"]
    assert machine.describe().startswith("host:8: 8 host devices")


def test_at_least_ten_plans_are_timed(machine: Machine) -> None:
    plans = measured_plans(machine)
    assert len(plans) >= 10
    assert len({plan.name for plan in plans}) == len(plans)
    assert all(predict(plan).step_time_s > 0 for plan in plans)


def test_a_bench_runs_on_all_devices() -> None:
    with HostDevices(2, module="shardsim.xla.bench_worker") as host:
        small = host.ask({"bench": "matmul", "size": 64})["seconds"]
        large = host.ask({"bench": "matmul", "size": 512})["seconds"]
        assert 0 < small < large
        assert host.ask({"bench": "collective", "kind": "all-gather", "elements": 1024})["seconds"]
        with pytest.raises(ShardsimError, match="KeyError"):
            host.ask({"bench": "unknown"})


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    with pytest.raises(ShardsimError, match="one length"):
        rank_correlation([1, 2], [1])
