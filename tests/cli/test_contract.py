"""What people script against: JSON fields, exit codes, what goes to which stream, the help."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from said import Shardsim
from said import data as read
from small_plan import PLAN

from shardsim.cli.main import main
from shardsim.files import read_yaml
from shardsim.plan import load_plan
from shardsim.validate.runs import PUBLISHED

PREDICTION = {
    *("model", "machine", "chips", "step_time_s", "tokens_per_s_per_chip", "mfu", "hfu", "hbm"),
    *("fits", "time", "collectives", "warnings"),
}
HBM = {
    *("capacity_bytes", "peak_bytes", "thrifty_bytes", "lavish_bytes", "parameters_bytes"),
    *("optimizer_bytes", "gradients_bytes", "activations_bytes", "workspace_bytes"),
}
TIME = {"compute_s", "hbm_bound_s", "exposed_comm_s", "bubble_s", "overhead_s"}
COLLECTIVE = {"kind", "mesh_axes", "bytes_per_chip", "count", "time_s", "exposed_s"}
PLAN_KEYS = {"model", "machine", "batch", "sequence", "mesh", "rules", "remat", "microbatches"}


def check_prediction(data: dict[str, Any]) -> None:
    assert set(data) >= PREDICTION
    assert set(data["hbm"]) == HBM
    assert set(data["time"]) == TIME
    assert sum(data["time"].values()) == pytest.approx(data["step_time_s"], rel=1e-9)
    assert isinstance(data["fits"], bool)
    assert 0 < data["mfu"] < 1
    assert data["mfu"] <= data["hfu"] * 1.01
    for use in data["collectives"]:
        assert set(use) >= COLLECTIVE
        assert use["exposed_s"] >= 0
    assert all(isinstance(text, str) for text in data["warnings"])


def test_predict(shardsim: Shardsim, plan_file: Path) -> None:
    result = shardsim("predict", str(plan_file), "--json")
    data = read(result)
    check_prediction(data)
    assert result.stderr == ""
    assert (data["model"], data["machine"], data["chips"]) == ("vit-l-16", "v4:4x4x4", 64)
    rate = 1024 * 197 / data["step_time_s"] / 64
    assert data["tokens_per_s_per_chip"] == pytest.approx(rate, rel=1e-9)


def test_a_plan_that_does_not_fit_exits_with_1(shardsim: Shardsim, plan_file: Path) -> None:
    huge = ("predict", str(plan_file), "--set", "batch=1048576", "--set", "remat=none")
    data = read(shardsim(*huge, "--json"), code=1)
    check_prediction(data)
    assert data["fits"] is False
    assert data["warnings"][0].startswith("does not fit: needs ")
    result = shardsim(*huge)
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout


def test_plan(shardsim: Shardsim, tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    words = ("plan", "vit-l", "--on", "v4:2x2x4", "--batch", "256", "--top", "3")
    result = shardsim(*words, "-o", str(out), "--json")
    data = read(result)
    assert set(data) >= {"plans", "searched", "priced", "fit", "seconds", "bound"}
    # All that fits is priced, or pruned by a bound that no better plan can beat.
    assert data["searched"] >= data["fit"] == data["pruned"] + data["priced"]
    assert data["priced"] >= len(data["plans"]) == 3
    assert set(data["bound"]) == {"step_time_s", "why"}
    assert data["bound"]["step_time_s"] <= data["plans"][0]["step_time_s"]
    for item in data["plans"]:
        check_prediction(item)
        assert set(item["plan"]) >= PLAN_KEYS
    mfus = [item["mfu"] for item in data["plans"]]
    assert mfus == sorted(mfus, reverse=True)
    assert f"{data['searched']:,} plans considered in" in result.stderr
    assert f"best plan written to {out}" in result.stderr
    again = read(shardsim("predict", str(out), "--json"))
    assert again == {key: data["plans"][0][key] for key in again}
    assert load_plan(out).machine.name == "v4:2x2x4"


def test_plan_with_layers_that_keep_more(shardsim: Shardsim) -> None:
    words = ("plan", "vit-22b", "--on", "v4:4x4x4", "--batch", "4096", "--max-axes", "1", "--json")
    mixed, one = (read(shardsim(*words, *more))["plans"][0] for more in (("--by-layer",), ()))
    assert len(mixed["plan"]["remat"]) == 2
    assert not isinstance(one["plan"]["remat"], list)
    assert mixed["step_time_s"] < one["step_time_s"]


def test_no_plan_fits(shardsim: Shardsim, tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    words = ("plan", "vit-22b", "--on", "v4:1x1x1", "--batch", "8", "-o", str(out))
    result = shardsim(*words, "--json")
    data = read(result, code=1)
    assert (data["plans"], data["fit"]) == ([], 0)
    assert "no plan fits in HBM" in result.stderr
    assert not out.exists()


def test_ablate(shardsim: Shardsim, plan_file: Path) -> None:
    result = shardsim("ablate", str(plan_file), "--json")
    data = read(result)
    assert result.stderr == ""
    check_prediction(data["base"])
    names = [item["technique"] for item in data["ablations"]]
    assert names == [
        "parallel layers",
        "bias removal",
        "asynchronous overlap",
        "sharded parameters",
        "rematerialisation",
    ]
    for item in data["ablations"]:
        assert (item["prediction"] is None) == (item["why_not"] is not None)
        if item["prediction"] is not None:
            check_prediction(item["prediction"])
            ratio = item["prediction"]["step_time_s"] / data["base"]["step_time_s"]
            assert item["step_time_ratio"] == pytest.approx(ratio)


def test_ablate_says_of_what_does_not_fit_that_it_does_not(shardsim: Shardsim) -> None:
    result = shardsim("ablate", "vit-22b-published-tp8")
    assert "every activation kept; does not fit" in result.stdout
    assert "serial layers  " in result.stdout


def test_sweep(shardsim: Shardsim, plan_file: Path, tmp_path: Path) -> None:
    csv = tmp_path / "out.csv"
    words = ("sweep", str(plan_file), "--vary", "batch=512,1000,1024")
    data = read(shardsim(*words, "--vary", "remat={save: [qkv, context]},full", "--json"))
    assert [row["values"] for row in data["rows"]] == [
        {"batch": batch, "remat": remat}
        for batch in (512, 1000, 1024)
        for remat in ({"save": ["qkv", "context"]}, "full")
    ]
    for row in data["rows"]:
        if row["values"]["batch"] == 1000:
            assert row["prediction"] is None
            assert "does not divide by 16" in row["why_not"]
        else:
            check_prediction(row["prediction"])
            assert row["why_not"] is None
    result = shardsim(*words, "--csv", str(csv))
    assert result.stderr == f"3 rows written to {csv}\n"
    lines = csv.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "batch,mfu,hfu,step_time_s,tokens_per_s_per_chip,peak_gib,fits,note"
    assert [line.split(",")[0] for line in lines[1:]] == ["512", "1000", "1024"]
    vary = ("--vary", "remat={save: [qkv, context]}", "--vary", "overlap.weights=true")
    shown = shardsim("sweep", str(plan_file), *vary, "--vary", "chip.hbm_bytes=8GiB").stdout
    assert "{save: [qkv, context]}             true      8589934592" in shown


def test_sweep_over_slices_lays_the_mesh_anew(shardsim: Shardsim, plan_file: Path) -> None:
    vary = ("--vary", "machine=v4:4x4x4,v4:4x4x8,v5e:8x8")
    data = read(shardsim("sweep", str(plan_file), *vary, "--json"))
    assert [row["prediction"]["chips"] for row in data["rows"]] == [64, 128, 64]


def test_dates_stay_text(shardsim: Shardsim, plan_file: Path) -> None:
    data = read(shardsim("sweep", str(plan_file), "--vary", "note=2020-01-01", "--json"))
    assert data["rows"][0]["values"] == {"note": "2020-01-01"}


def test_sensitivity(shardsim: Shardsim, plan_file: Path) -> None:
    data = read(shardsim("sensitivity", str(plan_file), "--json"))
    check_prediction(data["base"])
    figures = {item["figure"]: item["elasticity"] for item in data["sensitivities"]}
    assert figures["peak_flops"] < -0.05
    assert figures["link_bytes_per_s"] <= 1e-9
    sizes = [abs(item["elasticity"]) for item in data["sensitivities"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_evidence(shardsim: Shardsim) -> None:
    data = read(shardsim("evidence", "--json"))
    assert set(data) == {"plans", "groups", "hbm", "operations_median", "versions"}
    assert set(data["hbm"]) == {"within_5", "within_10", "false_fits", "false_refusals"}
    assert all(set(group) == {"model", "slice", "plans", "kendall"} for group in data["groups"])
    assert {plan["as"] for plan in data["plans"]} == {"emitted", "trainer"}
    # What SparseCores take to sum whole logits is not modelled (docs/compiled.md).
    assert set(data["hbm"]["false_fits"]) <= {"llama3-70b on tpu7x:4x4x4: 2-D tensor"}
    assert len(data["hbm"]["false_refusals"]) <= 1
    table = shardsim("evidence")
    assert table.exit_code == 0
    assert "MaxText on v5e:16x16" in table.stdout


def test_validate(shardsim: Shardsim, tmp_path: Path) -> None:
    some = tmp_path / "runs.yaml"
    some.write_text(json.dumps({"runs": read_yaml(PUBLISHED)["runs"][-5:]}))
    result = shardsim("validate", "--runs", str(some), "--json")
    data = read(result)
    assert len(data["rows"]) == 5
    assert result.stderr == ""
    wanted = {
        "id",
        "family",
        "measured_tokens_per_s_per_chip",
        "predicted_tokens_per_s_per_chip",
        "error",
    }
    for row in data["rows"]:
        assert set(row) >= wanted
        measured, predicted = (row[f"{name}_tokens_per_s_per_chip"] for name in
                               ("measured", "predicted"))  # fmt: skip
        if measured is not None:
            assert row["error"] == pytest.approx(predicted / measured - 1)
    assert isinstance(data["median_abs_error"], float)
    for item in data["constants"]:
        assert set(item) == {"name", "value", "fitted_to"}


def test_one_bad_run_does_not_hide_the_others(shardsim: Shardsim, tmp_path: Path) -> None:
    runs = tmp_path / "runs.yaml"
    good = "{id: good, model: vit-l, chip: v4, chips: 64, global_batch: 1024}"
    runs.write_text(f"runs:\n- {good}\n- {{id: bad, chip: v9}}\n- 5\n", encoding="utf-8")
    result = shardsim("validate", "--runs", str(runs), "--json")
    data = read(result)
    assert [row["id"] for row in data["rows"]] == ["good"]
    assert [item["id"] for item in data["failed"]] == ["bad", "runs[2]"]
    assert len(result.stderr.splitlines()) == 2
    runs.write_text("runs:\n- {id: bad, chip: v9}\n", encoding="utf-8")
    result = shardsim("validate", "--runs", str(runs), "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_hardware(shardsim: Shardsim) -> None:
    data = read(shardsim("hardware", "--json"))
    names = [chip["name"] for chip in data["chips"]]
    assert names[:7] == ["v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x"]
    chip = read(shardsim("hardware", "v5litepod", "--json"))
    assert chip["name"] == "v5e"
    assert all(figure["source"] for figure in chip["figures"].values())
    machine = read(shardsim("hardware", "v4-2048", "--json"))
    assert (machine["machine"], machine["chips"]) == ("v4:8x8x16", 1024)
    assert machine["explanation"] == "v4-2048 counts TensorCores: 1,024 chips, v4:8x8x16"


def test_models(shardsim: Shardsim, tmp_path: Path) -> None:
    data = read(shardsim("models", "--json"))
    assert "vit-22b" in [model["name"] for model in data["models"]]
    model = read(shardsim("models", "vit-22b", "--json"))
    assert (model["layers"], model["parameters"]) == (48, 21_743_271_936)
    assert all({"name", "axes", "shape"} <= set(tensor) for tensor in model["tensors"])
    path = tmp_path / "m.yaml"
    path.write_text("base: vit-22b\nlayers: 12\n", encoding="utf-8")
    assert read(shardsim("models", str(path), "--json"))["layers"] == 12


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_help_of_every_command_has_an_example(shardsim: Shardsim, name: str) -> None:
    result = shardsim(name, "--help")
    assert result.exit_code == 0
    assert f"\n    shardsim {name}" in result.stdout
    assert "Example" in result.stdout
    assert shardsim(name, "-h").stdout == result.stdout


@pytest.mark.parametrize("name", ["", *sorted(main.commands)])
def test_the_help_fits_a_narrow_terminal(
    shardsim: Shardsim, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = shardsim(*filter(None, [name]), "--help").stdout.splitlines()
    assert [line for line in lines if len(line) > 40 and "shardsim " not in line] == []


INTERRUPTED = """
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *rest):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
sys.meta_path.insert(0, Interrupts())
sys.argv = ["shardsim", "hardware"]
runpy.run_module("shardsim", run_name="__main__")
"""


def test_an_interrupt_while_it_loads_is_one_line() -> None:
    run = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SHARDSIM_SENSITIVITY_SET", "microbatches=2", ["--set", "microbatches=2"]),
        ("SHARDSIM_SENSITIVITY_AS", "ideal", ["--as", "ideal"]),
        ("SHARDSIM_SENSITIVITY_JSON", "1", ["--json"]),
    ],
)
def test_the_environment_says_options_by_the_names_that_people_write(
    shardsim: Shardsim,
    plan_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    words: list[str],
) -> None:
    written = shardsim("sensitivity", str(plan_file), *words)
    plain = shardsim("sensitivity", str(plan_file))
    monkeypatch.setenv(variable, value)
    said = shardsim("sensitivity", str(plan_file))
    assert said.stdout == written.stdout != plain.stdout
    monkeypatch.delenv(variable)
    monkeypatch.setenv("SHARDSIM_PLAN_TPO", "1")
    told = "SHARDSIM_PLAN_TPO is set, but no option has that name; did you mean "
    assert shardsim("sensitivity", str(plan_file)).stderr.startswith(f"{told}'SHARDSIM_PLAN_TOP'?")


def test_every_command_has_json(shardsim: Shardsim) -> None:
    for command in main.commands.values():
        assert isinstance(command, click.Command)
        assert "--json" in [option for item in command.params for option in item.opts]


def test_the_help_says_what_the_exit_status_means(shardsim: Shardsim) -> None:
    result = shardsim("--help")
    said = " ".join(result.stdout.split())
    assert "0 done, 1 the answer is no (does not fit), 2 bad input, 130 interrupted." in said
    assert shardsim("--version").exit_code == 0


def test_text_and_json_of_a_prediction_agree(shardsim: Shardsim, plan_file: Path) -> None:
    data = read(shardsim("predict", str(plan_file), "--json"))
    text = shardsim("predict", str(plan_file)).stdout
    assert f"MFU {100 * data['mfu']:.1f} %" in text
    assert f"{data['tokens_per_s_per_chip']:,.1f} tokens/s/chip" in text
    assert "mesh: data=16 (x4 z4), model=4 (y4)" in text


def test_a_plan_file_says_the_same_under_another_name(shardsim: Shardsim, tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yml", "c"):
        (tmp_path / name).write_text(PLAN, encoding="utf-8")
    outputs = {shardsim("predict", str(path)).stdout for path in tmp_path.iterdir()}
    assert len(outputs) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        (">/dev/full", 2, "error: cannot write the answer: No space left on device\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_an_answer_that_nobody_can_read_is_no_traceback(where: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m shardsim hardware v4 {where}"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (code, "", said)
