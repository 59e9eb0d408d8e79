"""Anyone's compiled program: its mesh, what it sends and where from, what would remove it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import hlo_samples as samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import shardsim
from test_damage import LETTERS
from test_dumps import BRANCHES, OFFLOAD

from shardsim.errors import PlanError, ShardsimError
from shardsim.machine import parse_machine
from shardsim.xla.hlo import HloError
from shardsim.xla.hlo.text import parse_module
from shardsim.xla.inspect import Inspected, inspect, inspect_file, inspect_hlo
from shardsim.xla.inspect.mesh import mesh_of
from shardsim.xla.replay import replay
from shardsim.xla.tpu import service

STEP = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def place(*spec):
    return NamedSharding(mesh, P(*spec))
def step(w, x):
    def loss(w):
        h = jnp.tanh(x @ w["in"])
        h = jax.lax.with_sharding_constraint(h, place("data", "model"))
        y = h @ w["out"]
        z = y.reshape(4, 64, -1).swapaxes(0, 1)
        z = jax.lax.with_sharding_constraint(z, place("model"))
        return (z ** 2).mean()
    value, gradients = jax.value_and_grad(loss)(w)
    return jax.tree.map(lambda a, g: a - g, w, gradients), value
def array(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(*spec))
weights = {"in": array((512, 1024), "data", "model"), "out": array((1024, 512), "model", "data")}
lowered = jax.jit(step, donate_argnums=0).lower(weights, array((256, 512), "data"))
open(sys.argv[1], "w").write(lowered.compile().as_text())
"""


@pytest.fixture(scope="module")
def host_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a step with shardings, compiled for eight host devices."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "step.py").write_text(STEP)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, str(folder / "step.py"), str(folder / "step.hlo")]
    subprocess.run(command, check=True, env=environment)
    return folder / "step.hlo"


def line_of(text: str) -> int:
    """Return the line of the step that holds a text."""
    return next(n for n, line in enumerate(STEP.splitlines(), 1) if text in line)


def test_a_step_of_ones_own_is_read_with_its_lines(host_step: Path) -> None:
    found = inspect_file(str(host_step), on="v5e:2x4", mesh="data=2,model=4")
    assert [dict(axis.torus) for axis in found.mesh] == [{"x": 2}, {"y": 4}]
    rows = [row.to_data() for row in found.rows]
    weights = [row for row in rows if row["argument"] == "w['in']"]
    assert {(row["kind"], tuple(row["mesh_axes"]), row["source_line"]) for row in weights} == {
        ("all-gather", ("data",), line_of("x @ w"))
    }
    assert not any(row["unexpected"] for row in weights)
    assert all(row["torus_axes"] == ["x"] for row in weights)
    turned = [row for row in rows if row["source_line"] == line_of("reshape(4, 64")]
    gathers = [row for row in turned if row["kind"] == "all-gather" and row["unexpected"]]
    assert gathers
    for row in gathers:
        (axis,) = row["mesh_axes"]
        assert f"'{axis}'" in row["constraint"]
        assert row["constraint"].startswith("jax.lax.with_sharding_constraint(x, P(")
    # What nothing hides cannot be said, nor the step; what each takes alone can.
    assert found.step_time_s is None
    assert any("for no TPU" in text for text in found.not_said)
    assert all(row["exposed_s"] is None and row["time_s"] > 0 for row in rows)


def test_without_names_the_mesh_is_what_the_groups_need(host_step: Path) -> None:
    found = inspect_file(str(host_step))
    assert [axis.size for axis in found.mesh] == [2, 4]
    assert not found.mesh_named
    assert all(row.time_s is None for row in found.rows)


def sums(found: Inspected) -> tuple[float, float]:
    """Return sent bytes and exposed seconds of the collectives of a step."""
    rows = [row for row in found.rows if row.kind not in ("copy", "host-transfer")]
    return sum(row.bytes for row in rows), sum(row.exposed_s or 0.0 for row in rows)


@pytest.mark.parametrize("name", ["vit-explicit", "llama-sparsecore"])
def test_rows_add_up_to_the_replayed_step(name: str) -> None:
    plan = samples.plan_of(name)
    found = inspect_hlo(samples.text_of(name), plan.machine, axes=plan.mesh)
    expected = replay(plan.machine, plan, samples.compiled(name))
    assert found.step_time_s == pytest.approx(expected.step_time_s, rel=1e-12)
    sent, exposed = sums(found)
    compiled = samples.compiled(name).collectives
    assert sent == pytest.approx(sum(one.sent_bytes * one.count for one in compiled), rel=1e-12)
    assert found.time is not None
    assert exposed == pytest.approx(found.time["exposed_comm_s"], rel=1e-9)
    operations = sum(one.time_s for one in found.operations)
    parts = ("compute_s", "hbm_bound_s", "overhead_s")
    assert operations == pytest.approx(sum(found.time[part] for part in parts), rel=0.05)
    costs = [row.exposed_s or 0.0 for row in found.rows]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("name", samples.NAMES)
def test_the_mesh_of_groups_explains_every_group(name: str) -> None:
    module = parse_module(samples.text_of(name))
    mesh, _ = mesh_of(module)
    found = inspect_hlo(samples.text_of(name))
    assert not any("no grid" in text for text in found.warnings)
    # Where groups take parts of an axis, it is cut there; the plan's own cuts remain.
    minor = list(accumulate(reversed([*mesh.values()]), mul))
    sizes = [size for size in samples.mesh_of(name).values() if size > 1]
    assert set(accumulate(reversed(sizes), mul)) <= set(minor)


KERNEL = """  %k = f32[8,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", \
operand_layout_constraints={f32[8,128]{1,0}}
"""


def test_a_kernel_that_is_not_known_is_priced_by_bytes_and_named() -> None:
    text = BRANCHES.replace("  ROOT %r =", KERNEL.replace("%k =", "%my_scan.4 =") + "  ROOT %r =")
    found = inspect_hlo(text, parse_machine("v5e:1x1"))
    assert any("kernel my_scan: the compiler gives no cycles" in text for text in found.warnings)
    assert found.step_time_s is not None
    without = inspect_hlo(BRANCHES, parse_machine("v5e:1x1")).step_time_s
    assert without is not None
    rate = parse_machine("v5e:1x1").chip.hbm_bytes_per_s
    assert found.step_time_s - without >= 2 * 8 * 128 * 4 / rate


def test_transfers_to_the_host_have_their_price() -> None:
    machine = parse_machine("v5e:1x1")
    (row,) = (row for row in inspect_hlo(OFFLOAD, machine).rows if row.kind == "host-transfer")
    assert (row.bytes, row.count) == (2 * 64 * 128 * 2, 2)
    assert row.time_s == row.exposed_s  # nothing else runs
    assert row.time_s is not None
    assert row.time_s > 0


_MARKS = (
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
)
SLICES = f"""HloModule slices, is_scheduled=true, num_partitions=4

%add (x: bf16[], y: bf16[]) -> bf16[] {{
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}}

ENTRY %main (a: bf16[256,1024]) -> (bf16[256,1024], token[]) {{
  %a = bf16[256,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  %inside = bf16[256,1024]{{1,0:T(8,128)(2,1)}} all-reduce(%a), replica_groups={{{{0,1,2,3}}}}, \
to_apply=%add, metadata={{op_name="jit(step)/psum"}}
  %t = token[] after-all()
  %send = (bf16[256,1024]{{1,0:T(8,128)(2,1)}}, u32[], token[]) send(%inside, %t), channel_id=2, \
is_host_transfer=true, {_MARKS}
  %recv = (bf16[256,1024]{{1,0:T(8,128)(2,1)}}, u32[], token[]) recv(%t), channel_id=1, \
is_host_transfer=true, {_MARKS}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %got = (bf16[256,1024]{{1,0:T(8,128)(2,1)}}, token[]) recv-done(%recv), channel_id=1, \
is_host_transfer=true
}}
"""


@pytest.mark.parametrize(
    ("mesh", "inside", "over"),
    [
        ({"replica": 2, "data": 4}, "data", "replica"),
        ({"data": 8}, "data", "data"),  # one axis over both slices and all of their devices
        (None, "devices", "slices"),
    ],
)
def test_what_slices_send_each_other_is_a_collective(
    mesh: dict[str, int] | None, inside: str, over: str
) -> None:
    machine = parse_machine("2*v5e:2x2")
    found = inspect_hlo(SLICES, machine, mesh)
    rows = {row.torus_axes: row for row in found.rows}
    assert set(rows) == {("x", "y"), ("dcn",)}
    assert rows["x", "y"].mesh_axes == (inside,)
    assert rows["dcn",].mesh_axes == (over,)
    size = 256 * 1024 * 2
    assert rows["x", "y"].bytes == pytest.approx(2 * size * 3 / 4)
    assert rows["dcn",].bytes == pytest.approx(2 * size * 1 / 2)
    assert not found.unexpected
    assert found.time is not None
    exposed = sum(row.exposed_s or 0.0 for row in found.rows)
    assert exposed == pytest.approx(found.time["exposed_comm_s"])
    # Half of the array to and from the other slice, by all four chips of a host at once.
    least = size / (machine.chip.dcn_bytes_per_s / machine.chip.devices_per_chip)
    assert rows["dcn",].time_s is not None
    assert rows["dcn",].time_s >= 0.99 * least


def test_without_its_slices_a_program_says_what_has_no_price() -> None:
    found = inspect_hlo(SLICES, parse_machine("v5e:2x2"))
    assert [row.kind for row in found.rows] == ["all-reduce"]
    assert sum("has no price" in text for text in found.warnings) == 4


def command(*arguments: str) -> tuple[int, str, str]:
    run = shardsim("inspect", *arguments)
    return run.exit_code, run.stdout, run.stderr


def test_the_command_tells_the_costliest_first_and_in_json(tmp_path: Path) -> None:
    path = tmp_path / "step.hlo.gz"
    path.write_bytes(gzip.compress(samples.text_of("llama-partitioned").encode()))
    code, out, _ = command("--hlo", str(path), "--on", "v5e", "--mesh", "data=2,fsdp=4,model=2")
    assert code == 0
    assert "v5e:4x4" in out
    assert "as the compiler scheduled it" in out
    code, out, _ = command("--hlo", str(path), "--on", "v5e:4x4", "--json")
    data: dict[str, Any] = json.loads(out)
    assert data["step_time_s"] == pytest.approx(sum(data["time"].values()))
    assert {"kind", "bytes", "exposed_s", "source_line", "unexpected", "constraint"} <= set(
        data["collectives"][0]
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "does not begin with 'HloModule NAME'"),
        (b"\x00\xff\xfe", "no text"),
        (gzip.compress(BRANCHES.encode())[:-20], "cut off or damaged"),
        (BRANCHES[: BRANCHES.rindex("}")].encode(), "the text ends inside computation"),
        (BRANCHES[: BRANCHES.rindex("=")].encode(), "the text is cut off"),
        (b"module @jit_f { stablehlo.add }", "this is StableHLO"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_status_2(
    data: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.hlo"
    path.write_bytes(data)
    code, out, err = command("--hlo", str(path))
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--on", "v5e:4x8"), "the program is for 16 devices, but v5e:4x8 has 32"),
        (("--on", "v99:4x4"), "v99"),
        (("--mesh", "data=3,model=2"), "multiply to 6"),
        (("--mesh", "data"), "is no axis"),
    ],
)
def test_another_slice_or_mesh_is_refused(
    options: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "step.hlo"
    path.write_text(samples.text_of("matmuls"))
    code, _, err = command("--hlo", str(path), *options)
    assert code == 2
    assert problem in err
    assert err.count("\n") == 1


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_text_gives_an_error_or_an_answer(host_step: Path, data: st.DataObject) -> None:
    text = host_step.read_text()
    start = text.index("\n%")
    place = data.draw(st.integers(start, len(text) - 1))
    length = data.draw(st.sampled_from([0, 1, 1, 5, 80]))
    letters = data.draw(st.text(LETTERS + "#\n", max_size=4))
    damaged = text[:place] + letters + text[place + length :]
    try:
        found = inspect_hlo(damaged, parse_machine("v5e:2x4"))
    except ShardsimError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(row.bytes >= 0 for row in found.rows)


@pytest.mark.slow
def test_calls_of_calls_without_end_do_not_hang() -> None:
    parts = ["HloModule deep, is_scheduled=true\n"]
    inner = "%c0 (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
    parts.append(inner + "  ROOT %n = f32[8]{0} negate(%p)\n}\n")
    for depth in range(1, 40):
        head = "ENTRY %main" if depth == 39 else f"%c{depth}"
        parts.append(
            f"{head} (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0:T(128)}} parameter(0)\n"
            f"  %a = f32[8]{{0}} call(%p), to_apply=%c{depth - 1}\n"
            f"  ROOT %b = f32[8]{{0}} call(%a), to_apply=%c{depth - 1}\n}}\n"
        )
    with pytest.raises(HloError, match=r"calls|often"):
        inspect_hlo("\n".join(parts))


def test_a_function_for_other_devices_is_told_what_to_give() -> None:
    jax = pytest.importorskip("jax")
    if not service.find_spec("libtpu"):
        pytest.skip("libtpu is not installed")
    with pytest.raises(PlanError, match="the function is for 1 devices, v5e:2x4 has 8"):
        inspect(lambda x: x + 1, jax.ShapeDtypeStruct((8,), "float32"), on="v5e:2x4")


def test_a_function_is_compiled_for_its_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax = pytest.importorskip("jax")
    if not service.find_spec("libtpu"):
        pytest.skip("libtpu is not installed")
    monkeypatch.setenv("SHARDSIM_CACHE", str(tmp_path))
    mesh = jax.sharding.AbstractMesh((2, 2), ("rows", "columns"))

    def array(*spec: str | None) -> Any:
        place = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct((1024, 1024), "bfloat16", sharding=place)

    def step(x: Any, w: Any) -> Any:
        return x @ w  # the contraction is split: a sum over columns

    found = inspect(step, array("rows", "columns"), array("columns", None), on="v5e:2x2")
    assert found.machine is not None
    assert found.mesh_named
    assert [axis.name for axis in found.mesh] == ["rows", "columns"]
    assert found.step_time_s is not None
    assert found.peak_bytes is not None
    assert found.peak_bytes >= found.arguments_bytes == 2 * 1024 * 1024 * (2 / 4 + 2 / 2) / 2
    (row,) = (row for row in found.rows if row.kind != "copy")
    assert row.mesh_axes == ("columns",)
    assert row.source.startswith("test_inspect.py:")
