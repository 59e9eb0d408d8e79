"""Slices: wrap rules, axes, names, what is refused and what is offered instead."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import HardwareError, ShardsimError
from shardsim.files import data_folder
from shardsim.machine import (
    Machine,
    chip_names,
    default_slice,
    explain,
    load_chip,
    load_chip_file,
    override_chip,
    parse_machine,
    possible_slices,
)

ALL_SLICES = [name for chip in chip_names() for name in possible_slices(chip)]


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v4:8x8x16", "xyz"), ("v4:4x4x4", "xyz"), ("v4:2x4x4", ""), ("v4:2x2x1", ""),
        ("v4:1x1x1", ""), ("v5p:16x20x28", "xyz"), ("v5p:2x2x4", ""), ("tpu7x:4x4x8", "xyz"),
        ("tpu7x:2x2x2", ""), ("v5e:16x16", "xy"), ("v5e:8x16", "y"), ("v5e:16x8", "x"),
        ("v6e:8x8", ""), ("v6e:16x16", "xy"), ("v3:32x32", "xy"), ("v3:16x32", "y"),
        ("v3:16x16", ""), ("v2:16x16", "xy"), ("v2:8x8", ""), ("h100:8", ""),
    ],
)  # fmt: skip
def test_wrap_rules(name, wraps):
    assert "".join(axis.name for axis in parse_machine(name).axes if axis.wrapped) == wraps


@given(st.sampled_from(ALL_SLICES))
def test_axes_multiply_to_the_devices_of_a_slice(name):
    machine = parse_machine(f"3*{name}")
    axes = machine.axes
    assert math.prod(axis.length for axis in axes) == machine.devices_per_slice
    assert machine.devices == 3 * machine.devices_per_slice
    assert machine.chips == 3 * math.prod(machine.shape)
    assert machine.hosts * machine.chip.chips_per_host >= machine.chips
    # The devices of a chip share its links: together they have no more than the chip.
    for axis in axes:
        if axis.name != "core":
            shared = axis.bytes_per_s * machine.chip.devices_per_chip
            assert shared == pytest.approx(machine.chip.link_bytes_per_s)


@pytest.mark.parametrize("chip", chip_names())
def test_possible_slices_are_accepted_and_keep_their_name(chip):
    for name in possible_slices(chip):
        assert parse_machine(name).name == name
        assert explain(name) is None


def test_two_devices_per_chip_are_a_last_axis():
    axes = parse_machine("tpu7x:4x4x8").axes
    assert [(axis.name, axis.length) for axis in axes] == [
        ("x", 4),
        ("y", 4),
        ("z", 8),
        ("core", 2),
    ]
    assert axes[0].bytes_per_s == 45e9
    assert axes[-1].bytes_per_s == 540e9
    assert [axis.name for axis in parse_machine("v3:4x4").axes] == ["x", "y", "core"]
    assert [axis.name for axis in parse_machine("v4:4x4x4").axes] == ["x", "y", "z"]


def test_gpus_of_a_node_share_a_switch():
    (axis,) = parse_machine("16*h100:8").axes
    assert (axis.name, axis.length, axis.switched, axis.wrapped) == ("node", 8, True, False)
    assert axis.bytes_per_s == 450e9


@given(name=st.sampled_from(ALL_SLICES), slices=st.integers(1, 999_999), data=st.data())
def test_names_round_trip(name, slices, data):
    base = parse_machine(name)
    shape = tuple(data.draw(st.permutations(base.shape)))
    machine = Machine(chip=base.chip, shape=shape, slices=slices)
    assert parse_machine(machine.name) == machine
    assert parse_machine(f"  {machine.name.upper()} ") == machine
    assert machine.describe().startswith(f"{machine.name}: {machine.chips:,} ")


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("v4-8", "v4:2x2x1"),
        ("v4-16", "v4:2x2x2"),
        ("v4-32", "v4:2x2x4"),
        ("v4-64", "v4:2x4x4"),
        ("v4-128", "v4:4x4x4"),
        ("v4-256", "v4:4x4x8"),
        ("v4-384", "v4:4x4x12"),
        ("v4-512", "v4:4x8x8"),
        ("v4-1024", "v4:8x8x8"),
        ("v4-1536", "v4:8x8x12"),
        ("v4-2048", "v4:8x8x16"),
        ("v4-4096", "v4:8x16x16"),
        ("v4-6144", "v4:12x16x16"),
        # Entries of MaxText's accelerator_to_spec_map.py (e591f30cb) that are far from cubes.
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-640", "v5p:4x4x20"),
        ("v5p-1280", "v5p:4x8x20"),
        ("v5p-3456", "v5p:12x12x12"),
        ("v5p-6272", "v5p:4x28x28"),
        ("v5p-7808", "v5p:4x4x244"),
        ("v5p-8704", "v5p:8x8x68"),
        ("v5p-8960", "v5p:8x20x28"),
        ("v5p-10368", "v5p:12x12x36"),
        ("v5p-11264", "v5p:8x16x44"),
        ("v5p-12288", "v5p:16x16x24"),
        ("v5p-13824", "v5p:12x24x24"),
        ("v5p-17920", "v5p:16x20x28"),
        ("v5e-1", "v5e:1x1"),
        ("v5e-8", "v5e:2x4"),
        ("v5e-256", "v5e:16x16"),
        ("v5litepod-256", "v5e:16x16"),
        ("Trillium-64", "v6e:8x8"),
        ("v6e-128", "v6e:8x16"),
        ("tpu7x-128", "tpu7x:4x4x4"),
        ("v3-8", "v3:2x2"),
        ("v3-2048", "v3:32x32"),
        ("v2-512", "v2:16x16"),
        ("2*v5p-256", "2*v5p:4x4x8"),
        ("h100-8", "h100:8"),
        ("h100-64", "8*h100:8"),
        ("trillium:4x4", "v6e:4x4"),
        ("V4: 8 X 8 x 16", "v4:8x8x16"),
        ("v4:8\N{MULTIPLICATION SIGN}8\N{MULTIPLICATION SIGN}16", "v4:8x8x16"),
        ("1*v4:4x4x4", "v4:4x4x4"),
        ("v4:8x16x8_twisted", "v4:8x16x8_twisted"),
        ("v5p:4x8x8_twisted", "v5p:4x8x8_twisted"),
    ],
)
def test_spellings(name, canonical):
    machine = parse_machine(name)
    assert machine.name == canonical
    assert parse_machine(canonical) == machine


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v4-2048", "v4-2048 counts TensorCores: 1,024 chips, v4:8x8x16"),
        ("v4-2", "v4-2 counts TensorCores: 1 chip, v4:1x1x1"),
        ("v5e-256", "v5e-256 counts chips: 256 chips, v5e:16x16"),
        ("2*v5p-256", "2*v5p-256 counts TensorCores: 128 chips a slice, 2*v5p:4x4x8"),
        ("tpu7x-128", "tpu7x-128 counts TensorCores: 64 chips, tpu7x:4x4x4"),
        ("v4:8x8x16", None),
    ],
)
def test_explain(name, text):
    assert explain(name) == text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v4:3x3x3", ["multiple of 4", "v4:4x4x4", "v4:2x4x4"]),
        ("v4:4x4x6", ["v4:4x4x4", "v4:4x4x8"]),
        ("v4:32x32x32", ["largest is 16x16x16", "v4:16x16x16", "8*v4:16x16x16"]),
        ("v4:8x8", ["3 axes", "v4:4x4x4"]),
        ("v5e:32x32", ["largest is 16x16", "v5e:16x16", "4*v5e:16x16"]),
        ("v5e:5x5", ["v5e:4x4", "v5e:4x8"]),
        ("v5e:2x2x2", ["2 axes", "v5e:2x4"]),
        ("v4-100", ["TensorCores: 50 chips", "v4:2x4x4 (32 chips)", "v4:4x4x4 (64 chips)"]),
        ("v4-3", ["TensorCores", "a chip has 2", "v4:1x1x1"]),
        ("v4-0", ["v4:1x1x1"]),
        ("v5e-300", ["v5e:16x16"]),
        ("v5e-512", ["2*v5e:16x16"]),
        ("v4:1024", ["1,024 chips are v4:8x8x16", "v4-1024", "512 chips, v4:8x8x8"]),
        ("v5e:256", ["v5e:16x16"]),
        ("v4:1000", ["v4:4x12x20 (960 chips)", "v4:8x8x16 (1,024 chips)"]),
        ("v4", ["a chip, not a slice", "v4:8x8x16"]),
        ("v4:4x4x4_twisted", ["cannot be twisted", "v4:4x4x8_twisted"]),
        ("v4:2x4x4_twisted", ["cannot be twisted", "v4:4x4x8_twisted"]),
        ("v5e:16x16_twisted", ["cannot be twisted", "no slice of v5e can"]),
        ("tpu7x:4x4x8_twisted", ["cannot be twisted"]),
        ("h100:64", ["up to 8", "8*h100:8"]),
        ("h100:3", ["h100:2", "h100:4"]),
        ("h100-12", ["h100:8", "2*h100:8"]),
        ("2*h100-64", ["16*h100:8"]),
        ("h100:2x4", ["no torus", "h100:8"]),
        ("0*v4:4x4x4", ["at least 1"]),
        ("v4:0x4x4", ["v4:1x1x1"]),
        ("foo:4x4", ["unknown chip 'foo'", "v5e"]),
        ("v5litpod-8", ["did you mean 'v5litepod'"]),
        ("v5e:8x8_twist", ["a slice is written v4:8x8x16"]),
        ("", ["a slice is written v4:8x8x16"]),
        ("v4:" + "8x" * 400 + "8", ["a slice is written v4:8x8x16"]),
    ],
)
def test_refusals_name_what_is_possible(name, parts):
    with pytest.raises(HardwareError) as caught:
        parse_machine(name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    for part in parts:
        assert part in message
    # What is offered is itself accepted.
    offered = re.findall(r"(?:\d+\*)?\b[a-z]\w+:\d+(?:x\d+)*(?:_twisted)?", message)
    for other in offered:
        if other not in name and other not in message.split(";")[0]:
            parse_machine(other)


LIKE_A_SLICE = st.from_regex(r"(\d+\*)?(v4|v5e|h100|tpu7x)[:-][\dx]{1,9}(_twisted)?")


@given(st.text(max_size=40) | LIKE_A_SLICE)
def test_any_text_gives_a_machine_or_one_line(text):
    message, machine = "", None
    try:
        machine = parse_machine(text)
    except ShardsimError as error:
        message = str(error)
    assert len(message.splitlines()) == (1 if machine is None else 0)
    assert machine is None or parse_machine(machine.name) == machine


def test_possible_slices():
    names = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
    assert possible_slices("v5e") == [f"v5e:{name}" for name in names]
    assert possible_slices("v6e") == [f"v6e:{name}" for name in names]
    assert possible_slices("v2")[-1] == "v2:16x16"
    assert possible_slices("v3") == [
        f"v3:{name}" for name in ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16", "16x32", "32x32")
    ]
    assert possible_slices("v4", 256)[0] == "v4:4x8x8"
    assert "v4:16x16x16" in possible_slices("v4")
    assert "v5p:16x16x24" in possible_slices("v5p")
    assert "tpu7x:16x24x24" in possible_slices("tpu7x")
    assert possible_slices("v4", 96) == []
    assert possible_slices("h100") == ["h100:1", "h100:2", "h100:4", "h100:8"]
    assert possible_slices("h100", 64) == ["8*h100:8"]
    assert possible_slices("h100", 12) == []


@pytest.mark.parametrize("name", chip_names())
def test_default_slice_has_the_chips_asked_for(name):
    for one in possible_slices(name):
        chips = parse_machine(one).chips
        assert default_slice(name, chips).chips == chips
        assert default_slice(name, chips).name == possible_slices(load_chip(name), chips)[0]


def test_default_slice():
    assert default_slice("v4", 1024).name == "v4:8x8x16"
    assert default_slice("h100", 64).name == "8*h100:8"
    assert default_slice("h100", 2).name == "h100:2"
    with pytest.raises(HardwareError, match=r"v4:4x4x4 \(64 chips\) or v4:4x4x8 \(128 chips\)"):
        default_slice("v4", 96)


def test_own_chip_in_a_name():
    own = load_chip_file(data_folder("hardware") / "v5e.yaml")
    faster = override_chip(own, {"link_bytes_per_s": 9e10})
    assert parse_machine("v5e:4x4", faster).axes[0].bytes_per_s == 9e10
    assert parse_machine("v5e-16", faster).chip is faster
    assert parse_machine("v4:4x4x4", faster).chip is load_chip("v4")


def test_machine_checks_itself():
    chip = load_chip("v4")
    with pytest.raises(HardwareError, match="has 3 axes"):
        Machine(chip=chip, shape=(4, 4))
    with pytest.raises(HardwareError, match="must be >= 1"):
        Machine(chip=chip, shape=(4, 4, 4), slices=0)
    with pytest.raises(HardwareError, match="can be twisted"):
        Machine(chip=chip, shape=(4, 4, 4), twisted=True)


def test_describe():
    assert parse_machine("2*v4-2048").describe() == (
        "2*v4:8x8x16: 2,048 TPU v4 chips in 2 slices, 512 hosts, torus 8x8x16 (all axes wrap), "
        "30.75 GiB HBM per device"
    )
    assert parse_machine("tpu7x:2x2x1").describe() == (
        "tpu7x:2x2x1: 4 TPU7x (Ironwood) chips (8 devices), 1 host, torus 2x2x1 (no axis wraps), "
        "94.75 GiB HBM per device"
    )
    assert parse_machine("16*h100:8").describe() == (
        "16*h100:8: 128 NVIDIA H100 SXM 80 GB GPUs, 16 nodes, 8 to a switch, "
        "73.28 GiB HBM per device"
    )
