"""The hardware files: sources, schema, what the loader refuses, overriding."""

from __future__ import annotations

import copy
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import FileError, HardwareError, ShardsimError
from shardsim.files import data_folder, read_yaml
from shardsim.machine import Chip, Constant, chip_names, load_chip, load_chip_file, override_chip
from shardsim.machine.catalog import ALIASES, STATUSES
from shardsim.units import GIB

TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
BOARDS = ("rpi4",)
GPUS = ("a100", "h100", "h100-500w", "h200", "h800", "v100")


@pytest.fixture
def v4() -> dict[str, Any]:
    """The v4 file as plain data, free to be changed."""
    return copy.deepcopy(read_yaml(data_folder("hardware") / "v4.yaml"))


def write(folder: Path, data: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def test_chip_names():
    assert set(chip_names()) == {*TPUS, *GPUS, *BOARDS}
    assert chip_names()[: len(TPUS)] == TPUS
    assert set(ALIASES) == set(chip_names())


@pytest.mark.parametrize("name", chip_names())
def test_every_figure_has_a_source(name):
    figures = load_chip(name).figures
    assert len(figures) >= 29
    for key, figure in figures.items():
        assert set(figure) <= {"value", "source", "status", "note", "fitted_to"}, key
        assert len(figure["source"]) >= 8, key
        assert figure["status"] in STATUSES, key
        assert ("fitted_to" in figure) == (figure["status"] == "fitted"), key


@pytest.mark.parametrize("name", chip_names())
def test_fields_are_the_figures(name):
    chip = load_chip(name)
    assert chip.name == name
    kinds = {"tpu": TPUS, "gpu": GPUS, "cpu": BOARDS}
    assert name in kinds[chip.kind]
    for key, figure in chip.figures.items():
        if key == "cmem_bytes":  # known of v4; nothing is priced by it
            continue
        if key.startswith("peak_flops."):
            assert chip.peak_flops[key.partition(".")[2]] == figure["value"]
        elif isinstance(figure["value"], list):
            assert list(getattr(chip, key)) == figure["value"]
        else:
            assert getattr(chip, key) == figure["value"]
    assert {constant.name for constant in chip.constants} == {
        key for key, figure in chip.figures.items() if figure["status"] == "fitted"
    }


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [
        ("v2", 2, 7.48),
        ("v3", 2, 15.48),
        ("v4", 1, 30.75),
        ("v5e", 1, 15.75),
        ("v5p", 1, 95.74),
        ("v6e", 1, 31.25),
        ("tpu7x", 2, 94.75),
    ],
)
def test_devices_and_hbm_are_those_of_the_compiler(name, devices, gib):
    chip = load_chip(name)
    assert chip.devices_per_chip == devices
    assert chip.hbm_usable_bytes_per_device / GIB == pytest.approx(gib, abs=1e-6)
    assert chip.hbm_usable_bytes < chip.hbm_bytes


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("v2", 46), ("v3", 123), ("v4", 275), ("v5e", 197), ("v5p", 459), ("v6e", 918),
        ("tpu7x", 2307), ("a100", 312), ("h100", 989), ("h200", 989), ("h800", 989), ("v100", 125),
    ],
)  # fmt: skip
def test_peaks(name, bf16):
    chip = load_chip(name)
    assert chip.peak("bf16") == chip.peak("float32") == bf16 * 1e12
    assert all(peak >= chip.peak("bf16") for peak in chip.peak_flops.values())


@pytest.mark.parametrize("name", ["v2", "v3", "v4", "v5e", "v5p"])
def test_peak_follows_from_clock_and_matrix_units(name):
    units = {"v2": 2, "v3": 4, "v4": 8, "v5e": 4, "v5p": 8}[name]
    chip = load_chip(name)
    assert chip.clock_hz is not None
    assert units * 2 * chip.mxu_dim**2 * chip.clock_hz == pytest.approx(chip.peak("bf16"), rel=0.01)


@pytest.mark.parametrize("name", TPUS)
def test_vector_rate_follows_from_clock(name):
    alus = 2048 if name in ("v2", "v3", "v4") else 4096
    chip = load_chip(name)
    assert chip.clock_hz is not None
    expected = alus * chip.cores_per_chip * chip.clock_hz
    assert chip.vector_flops == pytest.approx(expected, rel=1e-4)


def test_only_v4_has_common_memory():
    assert [name for name in TPUS if "cmem_bytes" in load_chip(name).figures] == ["v4"]
    assert load_chip("v4").figures["cmem_bytes"]["value"] == 128 * 2**20
    assert load_chip("v4").onchip_bytes == 32 * 2**20


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("v5litepod", "v5e"), ("V5Lite", "v5e"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"),
        ("Trillium", "v6e"), ("tpu_v6e", "v6e"), ("IRONWOOD", "tpu7x"), ("TPU7x", "tpu7x"),
        ("tpu-v4", "v4"), ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"),
    ],
)  # fmt: skip
def test_aliases(spelling, name):
    assert load_chip(spelling) is load_chip(name)


def test_a_board_has_no_memory_beside_its_own():
    assert load_chip("rpi4").host_bytes_per_device == 1


def test_aliases_are_unique():
    spellings = [
        re.sub("[ _-]", "", each.lower())
        for name, others in ALIASES.items()
        for each in (name, *others)
    ]
    assert len(set(spellings)) == len(spellings)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trilium", "'trillium'"),
        ("h10", "'h100'"),
        ("quantum", "choose from: a100, h100"),
        ("../v4", "choose from"),
        ("a\nb", "choose from"),
    ],
)
def test_unknown_chip(name, hint):
    with pytest.raises(HardwareError, match=re.escape(hint)) as caught:
        load_chip(name)
    assert "\n" not in str(caught.value)


def test_chips_can_be_hashed_copied_and_sent_to_a_worker():
    chip = load_chip("v4")
    again = pickle.loads(pickle.dumps(chip))
    assert again == chip
    assert hash(again) == hash(chip)


# The file format.


def test_own_file(v4, tmp_path):
    v4["name"] = "my-chip"
    v4["hbm_bytes_per_s"]["value"] = 2e12
    chip = load_chip_file(write(tmp_path, v4))
    assert (chip.name, chip.hbm_bytes_per_s) == ("my-chip", 2e12)
    assert chip.figures["hbm_bytes_per_s"]["value"] == 2e12


def test_optional_figures_may_be_left_out(v4, tmp_path):
    for key in ("clock_hz", "pcie_bytes_per_s", "cmem_bytes"):
        del v4[key]
    chip = load_chip_file(write(tmp_path, v4))
    assert chip.clock_hz is chip.pcie_bytes_per_s is None
    assert "cmem_bytes" not in chip.figures


def test_fitted_figures_become_constants(v4, tmp_path):
    del v4["compiler"]
    for figure in v4.values():
        if isinstance(figure, dict) and figure.pop("fitted_to", None):
            figure["status"] = "assumed"
    v4["dcn_hop_latency_s"].update(status="fitted", fitted_to="two runs", value=2e-4)
    chip = load_chip_file(write(tmp_path, v4))
    fitted = Constant(name="dcn_hop_latency_s", value=2e-4, fitted_to="two runs")
    assert chip.constants == (fitted,)
    assert override_chip(chip, {"hbm_efficiency": 0.5}).constants == (fitted,)
    assert override_chip(chip, {"dcn_hop_latency_s": 0.0}).constants == ()


def change(key: str, **figure: Any):
    def apply(data: dict[str, Any]) -> None:
        data.setdefault(key, {}).update(figure)

    return apply


def remove(key: str, inner: str | None = None):
    def apply(data: dict[str, Any]) -> None:
        del (data if inner is None else data[key])[inner or key]

    return apply


def put(key: str, value: Any):
    def apply(data: dict[str, Any]) -> None:
        data[key] = value

    return apply


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "source": "mine", "status": "assumed"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("hbm_byte_per_s", {}), "unknown key 'hbm_byte_per_s'; did you mean 'hbm_bytes_per_s'"),
        (remove("hbm_bytes_per_s"), "missing key 'hbm_bytes_per_s'"),
        (remove("name"), "missing key 'name'"),
        (remove("hbm_bytes", "source"), "hbm_bytes: missing key 'source'"),
        (change("hbm_bytes", source=" "), "hbm_bytes: source must be a text"),
        (change("hbm_bytes", status="rumoured"), "hbm_bytes: unknown status"),
        (change("hbm_bytes", status="fitted"), "hbm_bytes: status fitted needs fitted_to"),
        (change("hbm_bytes", fitted_to="x"), "hbm_bytes: fitted_to needs status fitted"),
        (change("mxu_dim", status="fitted", fitted_to="x"), "mxu_dim: only rates"),
        (change("hbm_bytes", sauce="x"), "hbm_bytes: unknown key 'sauce'; did you mean 'source'"),
        (change("hbm_bytes", value="32 GiB"), "hbm_bytes: value must be a number"),
        (change("hbm_bytes", value=True), "hbm_bytes: value must be a number"),
        (change("hbm_bytes", value=-1.0), "must be positive and finite, not -1"),
        (change("hbm_bytes", value=math.inf), "must be positive and finite, not inf"),
        (change("hbm_bytes", value=math.nan), "must be positive and finite, not nan"),
        (change("hbm_bytes", value=1.0), "hbm_usable_bytes must not exceed hbm_bytes"),
        (change("hop_latency_s", value=-1e-6), "hop_latency_s: value must be zero or positive"),
        (change("hbm_efficiency", value=1.01), "hbm_efficiency: value must be above 0"),
        (change("mxu_dim", value=128.5), "mxu_dim: value must be a positive whole number"),
        (change("wrap", value="cube"), "wrap: value must be one of cube4, length16, full, none"),
        (change("twistable", value=1), "twistable: value must be true or false"),
        (change("max_slice", value=[16, 0, 16]), "max_slice: value must be a list of positive"),
        (change("max_slice", value=[16, 16]), "max_slice must have 3 axes"),
        (change("torus_dims", value=1), "torus_dims must be 2 or 3 for a torus"),
        (change("devices_per_chip", value=2), "die_to_die_bytes_per_s must be given"),
        (put("scoped_vmem_bytes", figure(1000)), "value must be from 1024 to onchip_bytes"),
        (put("scoped_vmem_bytes", figure(1e30)), "value must be from 1024 to onchip_bytes"),
        (put("compiler_own_limit", {}), "goes with compiler and scoped_vmem_bytes"),
        (put("peak_flops", {}), "peak_flops: missing key 'bf16'"),
        (change("peak_flops", fp16={}), "peak_flops: unknown key 'fp16'"),
        (put("hbm_bytes", 3e10), "hbm_bytes: expected a mapping"),
        (put("name", "v4:x"), "name may have letters"),
        (put("name", 4), "name must be a word"),
        (put("kind", "npu"), "kind must be one of tpu, gpu"),
    ],
)
def test_bad_files_are_refused_in_one_line(v4, tmp_path, damage, message):
    damage(v4)
    path = write(tmp_path, v4)
    with pytest.raises(FileError) as caught:
        load_chip_file(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 3, {1: 2}])
def test_files_of_another_form_are_refused(data, tmp_path):
    with pytest.raises(FileError):
        load_chip_file(write(tmp_path, data))


# Overriding.


def test_override():
    chip = load_chip("v4")
    changed = override_chip(chip, {"link_bytes_per_s": 90e9, "peak_flops.bf16": 1e15})
    assert changed.link_bytes_per_s == 90e9
    assert changed.peak("bf16") == 1e15
    assert changed.peak("int8") == chip.peak("int8")
    assert changed.figures["link_bytes_per_s"]["source"] == "override"
    assert chip.link_bytes_per_s == 45e9
    assert chip.figures["link_bytes_per_s"]["value"] == 45e9
    assert override_chip(chip, {}) == chip


def test_usable_hbm_follows_hbm():
    chip = load_chip("v4")
    doubled = override_chip(chip, {"hbm_bytes": 2 * chip.hbm_bytes})
    assert doubled.hbm_usable_bytes == pytest.approx(2 * chip.hbm_usable_bytes)
    both = override_chip(chip, {"hbm_bytes": 2 * chip.hbm_bytes, "hbm_usable_bytes": 1e9})
    assert both.hbm_usable_bytes == 1e9


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hbm_byte_per_s", 1e12, "did you mean 'hbm_bytes_per_s'"),
        ("peak_flops", 1e15, "name one of peak_flops.bf16, peak_flops.int8"),
        ("peak_flops.fp4", 1e15, "name one of peak_flops.bf16, peak_flops.int8"),
        ("devices_per_chip", 2, "cannot be overridden"),
        ("name", "x", "cannot be overridden"),
        ("hbm_bytes_per_s", 0, "must be positive and finite, not 0"),
        ("hbm_bytes_per_s", math.nan, "must be positive and finite, not nan"),
        ("hbm_bytes_per_s", "1e12", "must be a number"),
        ("hbm_bytes_per_s", None, "must be a number"),
        ("hbm_bytes_per_s", 10**400, "is too large"),
        ("matmul_efficiency", 1.5, "must be above 0 and at most 1, not 1.5"),
        ("matmul_efficiency", 0, "must be above 0 and at most 1, not 0"),
        ("op_overhead_s", -1e-6, "must be zero or positive"),
        ("hbm_usable_bytes", 1e12, "must not exceed hbm_bytes"),
    ],
)
def test_bad_overrides_are_refused(key, value, message):
    with pytest.raises(HardwareError) as caught:
        override_chip(load_chip("v4"), {key: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30), st.one_of(st.floats(), st.text(), st.none(), st.integers()))
def test_overrides_never_fail_otherwise(key, value):
    message = ""
    try:
        override_chip(load_chip("v4"), {key: value})
    except ShardsimError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


def test_a_chip_checks_itself():
    chip = load_chip("v4")
    values = {name: getattr(chip, name) for name in Chip.__dataclass_fields__}
    with pytest.raises(HardwareError, match="chip v4: link_bytes_per_s must be positive"):
        Chip(**{**values, "link_bytes_per_s": 0.0})


def test_import_is_light():
    code = (
        "import sys, shardsim.machine as m; m.parse_machine('v4-2048'); "
        "print([name for name in ('numpy', 'jax', 'click') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
