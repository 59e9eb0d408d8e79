"""Damaged texts: a clear error, or exactly the right answer, never a silent wrong one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hlo_samples as samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.program.schedule import Copy, Start
from shardsim.xla.hlo import CompiledProgram, HloError, read_hlo

LETTERS = '0123456789abcdefTLEG%,(){}[]=-_. "x'


def totals(compiled: CompiledProgram) -> tuple[Any, ...]:
    """Return what must not change: FLOPs, and the collectives with their bytes and counts."""
    entries = Counter(
        (entry.kind, entry.mesh_axes, entry.parts, entry.array_bytes, entry.count)
        for entry in compiled.collectives
    )
    return compiled.flops, compiled.matmul_flops, sorted(entries.items())


def check(name: str, text: str) -> None:
    """Read a damaged sample."""
    before = samples.compiled(name)
    try:
        after = read_hlo(text, samples.mesh_of(name))
    except HloError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        new = set(after.schedule.warnings) - set(before.schedule.warnings)
        assert totals(after) == totals(before) or new


@st.composite
def damaged(draw: st.DrawFn, name: str) -> str:
    """Return a sample with one line gone, doubled, moved or changed in one place."""
    lines = samples.text_of(name).splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    line = lines[number]
    how = draw(st.sampled_from(["delete", "double", "move", "change", "change", "drop", "cut"]))
    if how == "delete":
        del lines[number]
    elif how == "double":
        lines.insert(number, line)
    elif how == "move":
        lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(number))
    elif line:
        # Most places of a line are in its backend_config, which says little: prefer the others.
        stop = line.find(", backend_config=") if draw(st.integers(0, 3)) else len(line)
        place = draw(st.integers(0, max(stop if stop > 0 else len(line), 1) - 1))
        if how == "change":
            lines[number] = line[:place] + draw(st.sampled_from(LETTERS)) + line[place + 1 :]
        elif how == "drop":
            lines[number] = line[:place] + line[place + 1 :]
        else:
            lines[number] = line[:place]
    return "\n".join(lines) + "\n"


@settings(max_examples=600)
@given(text=damaged("matmuls"))
def test_a_small_program(text: str) -> None:
    check("matmuls", text)


@settings(max_examples=12)
@given(text=damaged("llama-microbatches"))
def test_a_train_step(text: str) -> None:
    check("llama-microbatches", text)


COLLECTIVES = ("all-gather(", "all-reduce(", "collective-permute-start(", "reduce-scatter(")


@pytest.mark.parametrize(
    "name", ["matmuls", pytest.param("llama-partitioned", marks=pytest.mark.slow)]
)
def test_a_collective_cannot_disappear_or_double(name: str) -> None:
    lines = samples.text_of(name).splitlines()
    places = [i for i, line in enumerate(lines) if any(f" {word}" in line for word in COLLECTIVES)]
    assert len(places) >= 4
    for place in places[:: max(len(places) // 6, 1)]:
        for changed in (lines[:place] + lines[place + 1 :], lines[: place + 1] + lines[place:]):
            with pytest.raises(HloError):
                read_hlo("\n".join(changed), samples.mesh_of(name))


def test_every_digit_of_a_product_matters() -> None:
    name = "matmuls"
    lines = samples.text_of(name).splitlines()
    (number, *_) = (i for i, line in enumerate(lines) if " convolution(" in line)
    line = lines[number]
    stop = line.index(", metadata=") if ", metadata=" in line else len(line)
    shape = range(line.index("["), line.index("]"))
    for place in [i for i in shape if line[i].isdigit()]:
        for digit in "0123456789":
            if digit != line[place]:
                changed = [*lines]
                changed[number] = line[:place] + digit + line[place + 1 :]
                with pytest.raises(HloError):
                    read_hlo("\n".join(changed), samples.mesh_of(name))
    assert stop > shape.stop


def transfers(compiled: CompiledProgram) -> Counter[tuple[float, float]]:
    """Return the transfers of a step by their bytes, with how often they run."""
    return Counter(
        (float(task.task.hbm_bytes), float(block.trips))
        for block in compiled.schedule.blocks
        for task in block.tasks
        if isinstance(task, Start) and isinstance(task.task, Copy)
    )


CALLS = [
    number
    for number, line in enumerate(samples.text_of("llama-sparsecore").splitlines())
    if " call-start(" in line or " call-done(" in line
]


@st.composite
def damaged_call(draw: st.DrawFn) -> str:
    """Return the sample with one place of a call changed."""
    lines = samples.text_of("llama-sparsecore").splitlines()
    number = draw(st.sampled_from(CALLS))
    line = lines[number]
    stop = line.find(", metadata=") if ", metadata=" in line else line.find(", backend_config=")
    start = line.index(" = ")
    place = draw(st.integers(start, stop - 1))
    letter = draw(st.sampled_from(["", *LETTERS]))
    lines[number] = line[:place] + letter + line[place + 1 :]
    return "\n".join(lines) + "\n"


@settings(max_examples=40)
@given(text=damaged_call())
def test_a_damaged_call(text: str) -> None:
    before = samples.compiled("llama-sparsecore")
    try:
        after = read_hlo(text, samples.mesh_of("llama-sparsecore"))
    except HloError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert totals(after) == totals(before)
        assert transfers(after) == transfers(before)


@pytest.mark.slow
@pytest.mark.parametrize("opcode", ["call-start", "call-done"])
def test_a_call_cannot_disappear_or_double(opcode: str) -> None:
    name = "llama-sparsecore"
    lines = samples.text_of(name).splitlines()
    places = [number for number in CALLS if f" {opcode}(" in lines[number]]
    for place in places[:: max(len(places) // 6, 1)]:
        for changed in (lines[:place] + lines[place + 1 :], lines[: place + 1] + lines[place:]):
            with pytest.raises(HloError):
                read_hlo("\n".join(changed), samples.mesh_of(name))
