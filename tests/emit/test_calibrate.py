"""Measured figures as a hardware file, and the plans that are timed on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from shardsim.cost.collectives import collective_s
from shardsim.cost.network import Links
from shardsim.cost.predict import predict
from shardsim.emit.specs import plan_data
from shardsim.errors import FileError, PlanError, ShardsimError
from shardsim.files import data_folder
from shardsim.machine import Machine, chip_from_text
from shardsim.machine.catalog import load_chip_file
from shardsim.ops.activate import ACTIVATE
from shardsim.plan import load_plan, resolve
from shardsim.program.tasks import Compute
from shardsim.validate.measured import rank_correlation
from shardsim.xla import HostDevices, shrink
from shardsim.xla.calibrate import (
    ACTIVATE_ELEMENTS,
    COLLECTIVE_ELEMENTS,
    COLLECTIVE_KINDS,
    MATMUL_SHAPES,
    STREAM_ELEMENTS,
    TRANSPOSE_SIDE,
    Measured,
    hardware_file,
    waits,
)
from shardsim.xla.hlo.collect import sent_bytes
from shardsim.xla.host_plans import measured_plans
from shardsim.xla.measure import measured_result, on_host

START_S = {"all-gather": 20e-6, "reduce-scatter": 20e-6, "all-reduce": 40e-6}


def ideal(slower: float = 1.0) -> Measured:
    """Return times of eight devices of 10 GFLOP/s, 1 GB/s links, 20 us to start a collective."""
    return Measured(
        matmuls={(m, k, n): slower * (1e-6 + 2 * m * k * n / 10e9) for m, k, n in MATMUL_SHAPES},
        collectives={
            (kind, n, group): slower * (START_S[kind] + sent_bytes(kind, 4 * n, group) / 1e9)
            for kind in COLLECTIVE_KINDS
            for n in COLLECTIVE_ELEMENTS
            for group in (2, 8)
        },
        stream_s=slower * 8 * STREAM_ELEMENTS / 5e9,
        transpose_s=slower * 8 * TRANSPOSE_SIDE**2 / 0.5e9,
        activate_s=slower * ACTIVATE.fused * ACTIVATE_ELEMENTS / 3e9,
    )


def host_file(path: Path, slower: float = 1.0) -> Path:
    path.write_text(hardware_file("a test", 8, ideal(slower)))
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return the eight devices as a machine."""
    return Machine(chip=load_chip_file(host_file(tmp_path / "host.yaml")), shape=(8,))


def test_measured_times_become_rates(machine: Machine) -> None:
    chip = machine.chip
    assert chip.peak("bf16") == pytest.approx(10e9)
    assert chip.link_bytes_per_s == pytest.approx(1e9)
    assert chip.collective_overhead_s == pytest.approx(20e-6)
    assert chip.op_overhead_s == pytest.approx(1e-6)
    assert chip.hbm_bytes_per_s == pytest.approx(5e9)
    assert chip.vector_flops == pytest.approx(3e9)
    assert chip.kernels is not None
    assert chip.kernels.transpose_hbm_efficiency == pytest.approx(0.1)
    assert waits({"compute_s": 2.0, "exposed_comm_s": 0.5}, 4.0) == 4.0
    slow = chip_from_text(hardware_file("a test", 8, replace(ideal(), waits=4.0)), "a test")
    assert slow.link_bytes_per_s * slow.link_efficiency == pytest.approx(0.25e9)
    assert slow.collective_overhead_s == pytest.approx(80e-6)
    assert "a test" in chip.figures["link_bytes_per_s"]["source"]
    assert machine.describe().startswith("host:8: 8 host devices")


def test_a_calibrated_machine_prices_the_measured_collectives(machine: Machine) -> None:
    """What was measured comes out again, for groups of eight and of two."""
    plans = {plan.name: plan for plan in measured_plans(machine)}
    groups = {"data": ("data", 8), "fsdp and tensor 2": ("tensor", 2)}
    for name, (role, members) in groups.items():
        group = Links(machine, resolve(plans[name]))[role]
        for (kind, elements, size), measured_s in ideal().collectives.items():
            if size == members:
                assert collective_s(kind, group, 4 * elements) == pytest.approx(measured_s)


def test_a_machine_twice_as_slow_takes_twice_as_long(machine: Machine, tmp_path: Path) -> None:
    chip = load_chip_file(host_file(tmp_path / "slow.yaml", 2.0))
    slow = Machine(chip=chip, shape=(8,))
    for plan, slower in zip(measured_plans(machine), measured_plans(slow), strict=True):
        ratio = predict(slower).step_time_s / predict(plan).step_time_s
        assert ratio == pytest.approx(2, rel=1e-6)


def test_times_that_fall_with_size_still_give_a_machine() -> None:
    """Measured on a busy machine, anything may come out."""
    times = ideal()
    odd = {shape: 1e-3 / (1 + i) for i, shape in enumerate(times.matmuls)}
    text = hardware_file(
        "a test",
        8,
        Measured(
            matmuls=odd,
            collectives=times.collectives,
            stream_s=times.stream_s,
            transpose_s=times.transpose_s,
            activate_s=times.activate_s,
        ),
    )
    data = yaml.safe_load(text)
    assert data["peak_flops"]["bf16"]["value"] > 0
    assert data["op_overhead_s"]["value"] > 0


def test_at_least_ten_plans_are_timed(machine: Machine) -> None:
    plans = measured_plans(machine)
    assert len(plans) >= 10
    assert len({plan.name for plan in plans}) == len(plans)
    times = sorted(predict(plan).step_time_s for plan in plans)
    assert times[0] > 0
    assert times[-1] > 4 * times[0]
    # Nothing is hidden where devices share the cores.
    for plan in plans:
        uses = predict(plan).collectives
        assert sum(use.exposed_s for use in uses) == pytest.approx(sum(u.time_s for u in uses))


def test_what_xla_lays_out_anew_on_host_devices(machine: Machine) -> None:
    """Counted by hand, in float32: 512 rows of a device through 4 layers of 256 and 1,024."""
    plan = next(plan for plan in measured_plans(machine) if plan.name == "data, 64 images")
    moved = {"transpose": 0.0, "copy": 0.0}
    for _, task, times in predict(plan).schedule.runs():
        if isinstance(task, Compute) and task.kind in moved and not task.purpose:
            moved[task.kind] += float(times * task.count * task.hbm_bytes)
    rows, layers, read_and_written = 512, 4, 2 * 4
    # What gradients of six weights read, two arrays of each of six products of attention, and the
    # same of the patches' and the classifier's weights.
    turned = layers * rows * (5 * 256 + 1024 + 6 * 2 * 256) + rows * 256 + 8 * 16
    weights = 4 * 256 * 256 + 2 * 256 * 1024
    assert moved["transpose"] == read_and_written * turned
    assert moved["copy"] == read_and_written * layers * 2 * weights  # forward and backward


def test_a_plan_of_another_machine_is_put_on_host_devices(machine: Machine) -> None:
    tiny = shrink(load_plan("vit-22b-published-tp8"), 4)[0]
    plan = on_host(tiny, machine)
    assert plan.machine.name == "host:4"
    assert {axis.name: axis.size for axis in plan.mesh} == {a.name: a.size for a in tiny.mesh}


def test_a_bench_runs_on_all_devices(machine: Machine) -> None:
    tiny = shrink(load_plan("llama2-70b-published-v6e-1x256"), 2)[0]
    with HostDevices(2, module="shardsim.xla.bench_worker") as host:
        assert host.ask({"bench": "matmul", "m": 64, "k": 64, "n": 32})["seconds"] > 0
        assert host.ask({"bench": "stream", "elements": 1024})["seconds"] > 0
        assert host.ask({"bench": "activate", "elements": 1024})["seconds"] > 0
        assert host.ask({"bench": "transpose", "side": 16})["seconds"] > 0
        for kind in (*COLLECTIVE_KINDS, "permute"):
            asked = {"bench": "collective", "kind": kind, "elements": 1024, "group": 2}
            assert host.ask(asked)["seconds"] > 0
        answer = host.ask({"bench": "step", "data": plan_data(on_host(tiny, machine))})
        assert answer["seconds"] > 0
        assert answer["clock_s"] > 0
        with pytest.raises(ShardsimError, match="KeyError"):
            host.ask({"bench": "unknown"})


def test_a_measurement_needs_a_file_of_host_devices(tmp_path: Path) -> None:
    plan = load_plan("vit-22b-published-tp8")

    def ask(file: str, devices: int = 8) -> None:
        measured_result({}, plan, devices, "tiny", file, print)

    with pytest.raises(PlanError, match="8 devices"):
        ask("host.yaml", devices=4)
    with pytest.raises(FileError, match="No such file"):
        ask(str(tmp_path / "missing.yaml"))
    with pytest.raises(PlanError, match="host devices"):
        ask(str(data_folder("hardware") / "v4.yaml"))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    with pytest.raises(ShardsimError, match="one length"):
        rank_correlation([1, 2], [1])
