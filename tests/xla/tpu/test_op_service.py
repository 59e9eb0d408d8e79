"""Estimates of single operations: real ones, kept ones, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from said import shardsim

from shardsim.errors import ShardsimError
from shardsim.machine import load_chip
from shardsim.validate.op_fit import read_points
from shardsim.validate.ops import Op, parse_op
from shardsim.xla.tpu import op_service, service
from shardsim.xla.tpu.op_service import OpCompiler

needs_libtpu = pytest.mark.skipif(
    not service.find_spec("libtpu"), reason="libtpu is not installed (Linux on x86-64 only)"
)
ADD = parse_op("add:1,256,1,1024:bf16")
MATMUL = parse_op("matmul:1,512,512,512:bf16")

# Answers as the worker does, without a compiler; ends early at operations of 13 columns.
FAKE = """
import json, sys
sys.stdin.readline()
for line in sys.stdin:
    op = line.strip()
    if ",13:" in op:
        sys.exit("out of luck")
    answer = {"op": op, "error": "refused"} if op.startswith("gelu") else {"op": op, "cycles": 7}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the compiling process; return a list with one entry for each that was started."""
    started: list[int] = []
    real = subprocess.Popen

    def start(words: list[str], **options):
        assert words[-1] == "shardsim.xla.tpu.op_worker"
        started.append(1)
        return real([sys.executable, "-c", FAKE], **options)

    monkeypatch.setattr(service, "find_spec", lambda name: True)
    monkeypatch.setattr(op_service.subprocess, "Popen", start)
    return started


def add(columns: int, name: str = "add") -> Op:
    return Op(name=name, m=8, n=columns)


def test_estimates_are_kept_and_not_asked_for_again(fake, tmp_path):
    chip = load_chip("v4")
    ops = [add(columns) for columns in (1, 2, 3, 4)]
    said: list[str] = []
    first = OpCompiler(chip, folder=tmp_path, workers=2).estimate(ops, said.append)
    assert first == dict.fromkeys(ops, 7)
    assert len(said) == 4
    assert len(fake) == 2
    assert OpCompiler(chip, folder=tmp_path).estimate(ops, said.append) == first
    assert len(fake) == 2
    assert len(said) == 4


def test_a_line_that_an_interruption_cut_is_asked_for_again(fake, tmp_path):
    chip = load_chip("v4")
    OpCompiler(chip, folder=tmp_path).estimate([add(1), add(2)])
    (file,) = tmp_path.glob("v4-*.jsonl")
    file.write_text(file.read_text()[:-9], encoding="utf-8")
    again = OpCompiler(chip, folder=tmp_path)
    assert list(again.estimates) == [add(1)]
    assert again.estimate([add(1), add(2)]) == {add(1): 7, add(2): 7}


def test_what_was_estimated_before_a_crash_is_kept(fake, tmp_path):
    compiler = OpCompiler(load_chip("v4"), folder=tmp_path)
    assert compiler.estimate([add(1), add(13), add(2)]) == {add(1): 7}
    assert compiler.failed == {add(13): "the compiling process ended early"}
    assert list(OpCompiler(load_chip("v4"), folder=tmp_path).estimates) == [add(1)]


def test_refused_operations_are_named(fake, tmp_path):
    compiler = OpCompiler(load_chip("v4"), folder=tmp_path)
    assert compiler.estimate([add(1), add(2, "gelu")]) == {add(1): 7}
    assert compiler.failed == {add(2, "gelu"): "refused"}


def test_a_process_that_never_answers_is_one_line(fake, tmp_path):
    with pytest.raises(ShardsimError, match="out of luck"):
        OpCompiler(load_chip("v4"), folder=tmp_path).estimate([add(13)])


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    with pytest.raises(ShardsimError, match=r"pip install 'shardsim\[tpu\]'"):
        OpCompiler(load_chip("v4"), folder=tmp_path)


@pytest.mark.slow
@needs_libtpu
def test_the_command_gives_the_estimates_that_the_constants_were_fitted_to(tmp_path: Path):
    words = ["calibrate", "--against", "tpu-compiler", "--chip", "v4", "--cache", str(tmp_path)]
    result = shardsim(*words, "--op", ADD.text, "--op", MATMUL.text, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    points = read_points()
    costs = load_chip("v4").compiler
    assert costs is not None
    for row in data["ops"]:
        op = parse_op(row["op"])
        assert row["cycles"] > 0
        assert abs(row["fitted_cycles"] / row["cycles"] - 1) < 1.0
        if data["versions"] == points.versions:
            assert row["cycles"] == points.cycles["v4"][op]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say one of --device, --against tpu-compiler and --profile FILE"),
        (["--against", "tpu-compiler"], "needs --chip"),
        (["--against", "tpu-compiler", "--chip", ""], "needs --chip"),
        (["--against", "tpu-compiler", "--chip", "v44"], "did you mean 'v4'"),
        (["--device", "cpu", "--chip", "v4"], "go with --against tpu-compiler"),
        (["--against", "tpu-compiler", "--device", "cpu"], "say one of"),
        (
            ["--against", "tpu-compiler", "--chip", "v4", "--op", "add:1", "-o", "x.yaml"],
            "-o needs all operations",
        ),
        (["--against", "tpu-compiler", "--chip", "v4", "--op", "add:1"], "expected name:batch"),
        (["--against", "tpu-compiler", "--chip", "h100"], "knows only TPUs"),
    ],
)
def test_mistakes_are_one_line(words, message, monkeypatch):
    monkeypatch.setattr(service, "find_spec", lambda name: True)
    result = shardsim("calibrate", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
