"""Units in, stdout out, exit status of interrupts, settings from outside, the cache, the API."""

from __future__ import annotations

import json
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from said import Shardsim, data, refused

import shardsim as ss
from shardsim.answers.explain import explain
from shardsim.cli.output import progress_line
from shardsim.files import parse_yaml
from shardsim.planner.changes import parse_assignment
from shardsim.planner.presets import plan_of_mesh
from shardsim.planner.rank import Ranking
from shardsim.planner.whatif import sweep
from shardsim.simulate import simulate_plan
from shardsim.units import measure_of, read_number
from shardsim.xla.tpu.cache import Cache

SEARCH = ("plan", "vit-b-16", "--on", "v5e:2x2", "--batch", "256", "--max-axes", "1", "--top", "2")
TWICE = """\
model: llama2-7b
machine: v4:4x4x4
batch: 64
mesh: {data: 16, model: 4}
rules:
  parameters: {embed: [data], mlp: [data], vocab: [data], heads: [model]}
  activations: {batch: [data], heads: [model], mlp: [model]}
"""


# Units.


@given(st.integers(1, 999), st.sampled_from(["", "k", "M", "G", "T"]), st.booleans())
def test_numbers_with_prefixes(digits: int, prefix: str, whole: bool) -> None:
    base = 1024 if whole else 1000
    expected = digits * base ** ["", "k", "M", "G", "T"].index(prefix)
    assert read_number(f"{digits}{prefix}", whole=whole) == expected
    assert read_number(f"{digits}{prefix}i" if prefix else f"{digits}", whole=whole) == (
        digits * 1024 ** ["", "k", "M", "G", "T"].index(prefix)
    )


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_none(text: str) -> None:
    number = read_number(text, units=("B/s", "s"))
    assert number is None or isinstance(number, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("batch=64k", 65536),
        ("batch=1e5", 100000),
        ("batch=96", 96),
        ("sequence=8K", 8192),
        ("mesh.model=4", 4),
        ("model.layers=1e1", 10),
        ("chip.link_bytes_per_s=90GB/s", 90e9),
        ("chip.link_bytes_per_s=100Gbit/s", 12.5e9),
        ("chip.hbm_bytes=64GiB", 64.0 * 2**30),
        ("chip.hop_latency_s=2us", 2e-6),
        ("chip.peak_flops.bf16=275TFLOP/s", 275e12),
        ("chip.clock_hz=1.75GHz", 1.75e9),
        ("experts.imbalance=1.5", 1.5),
        ("name=64k", "64k"),
        ("remat=full", "full"),
        ("note=2020-01-01", "2020-01-01"),
        ("chip.link_bytes_per_s=64GiB", "64GiB"),  # a size is no rate
    ],
)
def test_values_as_people_write_them(text: str, value: Any) -> None:
    read = parse_assignment(text)[1]
    assert type(read) is type(value)
    assert read == pytest.approx(value) if isinstance(value, float) else read == value


@given(st.integers(-(2**40), 2**40) | st.booleans() | st.none() | st.sampled_from(["full", "off"]))
def test_what_needs_no_unit_is_read_as_yaml(value: Any) -> None:
    text = {True: "true", False: "false", None: "null"}.get(value, str(value))
    if not isinstance(value, bool) and value is not None and value in (0, 1):
        text = str(value)
    assert parse_assignment(f"microbatches={text}")[1] == parse_yaml(text, "")


def test_every_kind_of_figure_has_an_example_that_it_takes() -> None:
    for key in ("chip.link_bytes_per_s", "chip.hbm_bytes", "chip.hop_latency_s", "chip.clock_hz"):
        units, example = measure_of(key)
        assert read_number(example, units=units)


def test_counts_of_options(shardsim: Shardsim) -> None:
    words = ("predict", "vit-b-16", "--on", "v5e:2x2", "--mesh", "fsdp=4", "--json")
    one, other = (data(shardsim(*words, "--batch", batch)) for batch in ("1k", "1024"))
    assert one == other
    said = refused(shardsim(*words, "--batch", "1.3"))
    assert "'1.3' is not a whole number, such as 65536 or 64k" in said


# Output.


def test_a_dash_is_stdout(shardsim: Shardsim, plan_file: Path, tmp_path: Path) -> None:
    result = shardsim(*SEARCH, "-o", "-")
    plan = parse_yaml(result.stdout, "stdout")
    best = data(shardsim(*SEARCH, "--json"))["plans"][0]["plan"]
    assert plan == best
    assert "MFU %" in result.stderr  # the table is still shown
    exported = shardsim("export", str(plan_file), "--to", "json", "-o", "-")
    assert json.loads(exported.stdout)
    trace = shardsim("timeline", str(plan_file), "-o", "-")
    assert json.loads(trace.stdout)["traceEvents"]
    table = shardsim("sweep", str(plan_file), "--vary", "batch=1k,2k", "--csv", "-").stdout
    assert [line.split(",")[0] for line in table.splitlines()] == ["batch", "1024", "2048"]
    assert not Path("-").exists()
    message = "-o - and --json would both write to stdout; choose one"
    assert refused(shardsim(*SEARCH, "-o", "-", "--json")) == message


def test_a_timeline_in_no_form_is_refused(shardsim: Shardsim, plan_file: Path) -> None:
    said = refused(shardsim("timeline", str(plan_file), "-o", "t.txt"))
    assert said == "-o t.txt: must end with .json, .png, .svg, .pdf"


@pytest.mark.parametrize(
    ("words", "written", "name"),
    [
        ((*SEARCH, "-o", "best.json"), ".json", "best.yaml"),
        (("export", "PLAN", "-o", "train.json"), ".json", "train.py"),
        (("export", "PLAN", "--to", "json", "-o", "a.b.yaml"), ".yaml", "a.b.json"),
        (("sweep", "PLAN", "--vary", "batch=1k,2k", "--csv", "t.json"), ".json", "t.csv"),
        (("import", "PLAN", "--from", "maxtext", "-o", "p.py"), ".py", "p.yaml"),
    ],
)
def test_a_file_is_not_called_what_it_is_not(
    shardsim: Shardsim, plan_file: Path, words: tuple[str, ...], written: str, name: str
) -> None:
    named = [word.replace("PLAN", str(plan_file)) for word in words]
    said = refused(shardsim(*named))
    assert said == f"-o {named[-1]}: what is written is no {written}; name it {name}"


def test_a_failing_write_hides_no_result(
    shardsim: Shardsim, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise ss.ShardsimError("cannot write p.yaml: No space left on device")

    monkeypatch.setattr("shardsim.cli.output.write_text", full)
    result = shardsim(*SEARCH, "-o", str(tmp_path / "p.yaml"))
    assert result.exit_code == 2
    assert "MFU %" in result.stdout
    assert result.stderr.endswith("error: cannot write p.yaml: No space left on device\n")
    result = shardsim("sweep", str(plan_file), "--vary", "batch=1k", "--csv", str(tmp_path / "c"))
    assert (result.exit_code, "MFU %" in result.stdout) == (2, True)


# Interrupts.


def stopping(monkeypatch: pytest.MonkeyPatch, where: str, after: int = 0) -> None:
    """Interrupt what is called at `where` after some calls."""
    module, name = where.rsplit(".", 1)
    real = getattr(import_module(module), name)
    calls = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(where, stop)


def test_an_interrupted_search_shows_the_best_so_far_and_says_so(
    shardsim: Shardsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.yaml"
    real, calls = Ranking.look, []

    def look(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(Ranking, "look", look)
    result = shardsim(*SEARCH, "-o", str(out))
    assert result.exit_code == 130
    assert "MFU %" in result.stdout
    assert "interrupted, so these are the best so far" in result.stderr
    assert ss.load_plan(out).note == "Best so far of a search that was interrupted."


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("predict", "PLAN"), "shardsim.cost.predict.predict"),
        (("explain", "PLAN"), "shardsim.answers.explain.explain"),
        (("ablate", "PLAN"), "shardsim.planner.whatif.ablate"),
        (("report", "PLAN", "-o", "OUT/r.html"), "shardsim.report.write.validated"),
        (("export", "PLAN", "-o", "OUT/t.py"), "shardsim.emit.export_plan"),
        (("hardware",), "shardsim.machine.load_chip"),
    ],
)
def test_an_interrupt_ends_any_command_with_130(
    shardsim: Shardsim,
    plan_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    where: str,
) -> None:
    stopping(monkeypatch, where)
    out = tmp_path / "out"
    out.mkdir()
    named = [word.replace("PLAN", str(plan_file)).replace("OUT", str(out)) for word in words]
    result = shardsim(*named)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert list(out.iterdir()) == []


def test_an_interrupt_inside_an_import_is_one_too(
    shardsim: Shardsim, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:  # as Python does where a class is being made
            raise RuntimeError("Error calling __set_name__ on 'x' instance") from error

    monkeypatch.setattr("shardsim.cost.predict.predict", stop)
    result = shardsim("predict", str(plan_file))
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_an_interrupted_sweep_shows_what_is_done(
    shardsim: Shardsim, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, "shardsim.planner.whatif._changed_run", 2)
    result = shardsim("sweep", str(plan_file), "--vary", "batch=1024,2048,4096,8192")
    assert result.exit_code == 130
    assert "interrupted: 2 of 4 combinations" in result.stderr
    assert result.stdout.count("\n") == 4


# Settings from outside.


def test_options_come_from_the_environment(
    shardsim: Shardsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSIM_PLAN_TOP", "1")
    assert len(data(shardsim(*SEARCH[:-2], "--json"))["plans"]) == 1
    assert len(data(shardsim(*SEARCH, "--json"))["plans"]) == 2  # what is written counts more
    monkeypatch.setenv("SHARDSIM_PLAN_TOP", "many")
    assert "is not a whole number" in refused(shardsim(*SEARCH[:-2]))


def test_options_come_from_a_file(
    shardsim: Shardsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.yaml"
    monkeypatch.setenv("SHARDSIM_SETTINGS", str(path))
    words = SEARCH[:-2]
    assert "No such file" in refused(shardsim(*words))
    path.write_text("plan: {top: 1, fix: remat=full}\nexplain: {as: trainer}\n", encoding="utf-8")
    (only,) = data(shardsim(*words, "--json"))["plans"]
    assert only["plan"]["remat"] == "full"
    monkeypatch.setenv("SHARDSIM_PLAN_TOP", "2")
    assert len(data(shardsim(*words, "--json"))["plans"]) == 2
    for text, message in (
        ("plans: {}", "unknown key 'plans'; did you mean 'plan'?"),
        ("plan: {tops: 1}", "plan: unknown key 'tops'; did you mean 'top'?"),
        ("plan: {top: many}", "is not a whole number"),
        ("plan: {top: {}}", "plan: top: expected a value"),
        ("plan: {top: [1, 2]}", "plan: top: expected one value, found [1, 2]"),
        ("plan: {top: []}", "plan: top: expected one value, found []"),
        ('plan: {output: "a\\0b"}', "plan: output: a null byte is in no name"),
        ("plan: {json: 3.5}", "plan: json: expected true or false, found 3.5"),
        ("plan: {by-layer: 'yes'}", "plan: by-layer: expected true or false, found 'yes'"),
        ("- 1", "expected a mapping of keys, found list"),
        ("plan: [", "not valid YAML"),
    ):
        path.write_text(text, encoding="utf-8")
        monkeypatch.delenv("SHARDSIM_PLAN_TOP", raising=False)
        assert message in refused(shardsim(*words))


def test_the_cache_is_listed_measured_and_cleared(
    shardsim: Shardsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSIM_CACHE", str(tmp_path))
    assert data(shardsim("cache", "--json"))["entries"] == []
    Cache().put("k", {"memory": {}}, "text")
    listed = data(shardsim("cache", "list", "--json"))
    assert [row["name"] for row in listed["entries"]] == ["k"]
    assert listed["bytes"] == sum(
        path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()
    )
    assert shardsim("cache", "size").stdout.startswith("1 entries, ")
    assert "k" in shardsim("cache").stdout
    assert data(shardsim("cache", "clear", "--json"))["removed"] is True
    assert Cache().entries() == []


# Messages.


def test_one_axis_on_two_dimensions_of_a_weight(shardsim: Shardsim, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(TWICE, encoding="utf-8")
    said = refused(shardsim("predict", str(path)))
    assert said == (
        f"{path}: rules.parameters: 'data' splits two dimensions of one weight, embed and mlp; an "
        "axis can split only one of them"
    )
    path.write_text(
        TWICE.replace("mlp: [data], vocab: [data], ", "mlp: [model], "), encoding="utf-8"
    )
    assert shardsim("predict", str(path)).exit_code == 0


def test_a_format_that_the_chip_does_not_multiply(shardsim: Shardsim, plan_file: Path) -> None:
    words = ("predict", str(plan_file), "--set", "precision.compute=fp8")
    assert refused(shardsim(*words)) == (
        "small: precision.compute: v4 has no fp8; choose from: bf16, int8, f32"
    )
    assert shardsim(*words, "--set", "machine=v6e:8x8").exit_code == 0


def test_figures_of_several_formats_are_named(shardsim: Shardsim, plan_file: Path) -> None:
    said = refused(shardsim("predict", str(plan_file), "--set", "chip.peak_flops=1e15"))
    assert said.endswith("name one of peak_flops.bf16, peak_flops.int8")
    said = refused(shardsim("predict", str(plan_file), "--set", "chip.link_bytes_per_s=64GiB"))
    assert said.endswith("must be a number, not '64GiB'; such as 90GB/s")


def test_a_broken_link_stands_beside_the_healthy_step(shardsim: Shardsim, plan_file: Path) -> None:
    words = ("predict", str(plan_file), "--fidelity", "events")
    healthy = data(shardsim(*words, "--json"))
    broken = data(shardsim(*words, "--dead-link", "0,0,0-1,0,0", "--json"))
    assert healthy["events"]["healthy_step_time_s"] is None
    assert broken["events"]["healthy_step_time_s"] == healthy["step_time_s"]
    assert broken["step_time_s"] >= healthy["step_time_s"]
    shown = shardsim(*words, "--dead-link", "0,0,0-1,0,0").stdout
    more = broken["step_time_s"] / healthy["step_time_s"] - 1
    assert f": this is {100 * more:+.1f} %" in shown


def test_axes_by_their_roles_and_new_ones(shardsim: Shardsim, plan_file: Path) -> None:
    """The plan's `data` shards weights, so its role is fsdp; it has no data axis and no context."""
    words = ("predict", str(plan_file), "--json")
    by_name = data(shardsim(*words, "--set", "mesh.model=8"))
    assert data(shardsim(*words, "--set", "mesh.tensor=8")) == by_name
    plan = ss.changed(plan_file, {"mesh.context": 1, "mesh.tensor": 2})
    assert [(axis.name, axis.size) for axis in plan.mesh] == [
        ("data", 32), ("context", 1), ("model", 2)
    ]  # fmt: skip
    said = refused(shardsim("predict", str(plan_file), "--set", "mesh.pipeline=2"))
    assert "1 cannot fill 2 pipeline stages" in said


@pytest.mark.parametrize("rules", ["5", "[]", "{parameters: 5}", "{parameters: {embed: 5}}", "{}"])
def test_a_new_axis_beside_rules_that_are_none(
    shardsim: Shardsim, plan_file: Path, rules: str
) -> None:
    words = ("--set", f"rules={rules}", "--set", "mesh.context=2")
    refused(shardsim("predict", str(plan_file), *words))
    for size in ("none", "0", "1.5", "true"):
        said = refused(shardsim("predict", str(plan_file), "--set", f"mesh.context={size}"))
        assert "mesh.context: must be a positive whole number" in said


def test_more_slices_are_the_data_axis_s() -> None:
    name, four = "llama2-70b-published-v6e-1x256", "4*v6e:16x16"
    plan = ss.changed(name, {"machine": four, "batch": 1024})
    axes = [(axis.name, axis.size, dict(axis.torus)) for axis in plan.mesh]
    assert axes == [("data", 4, {"dcn": 4}), ("fsdp", 256, {"x": 16, "y": 16})]
    less = ss.changed(plan, {"machine": "2*v6e:16x16"})
    assert [axis.size for axis in less.mesh] == [2, 256]
    smaller = ss.changed(plan, {"machine": "4*v6e:8x16"})
    assert [axis.size for axis in smaller.mesh] == [4, 128]


@pytest.mark.parametrize("role", ["data", "tensor", "context"])
def test_a_new_axis_does_what_its_role_does(role: str) -> None:
    model, machine = ss.load_model("llama2-7b"), ss.parse_machine("v5p:4x4x4")
    made = ss.changed(plan_of_mesh(model, machine, 128, {"fsdp": 64}), {f"mesh.{role}": 4})
    whole = plan_of_mesh(model, machine, 128, {"fsdp": 16, role: 4})
    one, other = ss.predict(made), ss.predict(whole)
    assert one.step_time_s == pytest.approx(other.step_time_s, rel=1e-12)
    assert made.mesh == whole.mesh


# Python.


def test_calls_take_names_paths_and_plans(plan_file: Path) -> None:
    plan = ss.load_plan(plan_file)
    for given_plan in (str(plan_file), plan_file, plan):
        assert ss.predict(given_plan).step_time_s == ss.predict(plan).step_time_s
        assert ss.sensitivity(given_plan)[0] == ss.sensitivity(plan)[0]
        assert ss.changed(given_plan, {"batch": 2048}).batch == 2048
        assert ss.as_plan(given_plan).mesh == plan.mesh
    assert ss.export_plan(plan_file, "json") == ss.export_plan(plan, "json")
    assert len(ss.ablate(plan_file)) == len(ss.ablate(plan))
    (row,) = ss.sweep(plan, {"batch": [2048]})
    assert ss.utilisations(plan_file) == ss.utilisations(ss.predict(plan))
    assert row[1] is not None
    one, other = ss.compare(plan_file, ss.changed(plan, {"batch": 2048}))
    assert (one.costs, other.plan.batch) == ("calibrated", 2048)


@pytest.mark.parametrize(
    "call",
    [
        lambda plan: ss.predict(3),
        lambda plan: ss.save_plan({"model": "vit-b-16"}, "x.yaml"),
        lambda plan: ss.changed(plan, 3),
        lambda plan: list(ss.sweep(plan, "batch=1,2")),
        lambda plan: list(ss.sweep(plan, [("batch", 2048)])),
        lambda plan: ss.compare(plan),
        lambda plan: ss.explain(plan, measured_mfu="41%"),
        lambda plan: ss.search("vit-b-16", "v5e:1x1", "64k"),
        lambda plan: ss.search("vit-b-16", [], 64),
        lambda plan: ss.search("vit-b-16", "v5e:1x1", 64, top=0),
        lambda plan: ss.search("vit-b-16", 3, 64),
        lambda plan: ss.search("vit-b-16", "v5e:1x1", 64, fix="remat=full"),
    ],
)
def test_wrong_arguments_are_one_line_errors(call: Any, plan_file: Path) -> None:
    with pytest.raises(ss.ShardsimError) as error:
        call(plan_file)
    assert "\n" not in str(error.value)


def test_what_is_shown_is_one_short_line(plan_file: Path) -> None:
    item = ss.predict(plan_file)
    things = (item, item.plan, item.plan.model, item.plan.machine, item.plan.machine.chip)
    for thing in (*things, ss.explain(plan_file), ss.search("vit-b-16", "v5e:1x1", 8, top=1)):
        assert len(repr(thing)) < 400
        assert "\n" not in repr(thing)


def test_plans_of_different_batches_are_compared_by_the_token(
    shardsim: Shardsim, plan_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    ss.save_plan(ss.changed(plan_file, {"batch": 2048}), other)
    words = ("compare", str(plan_file), str(other))
    shown = shardsim(*words).stdout
    assert "time per token +%" in shown
    assert "step +%" in shardsim("compare", str(plan_file), str(plan_file)).stdout
    both = data(shardsim(*words, "--tokens", "300B", "--chip-hour-price", "2", "--json"))["plans"]
    costs = [row["training"]["cost"] / row["training"]["chip_hours"] for row in both]
    assert costs == pytest.approx([2, 2])
    ratio = both[1]["training"]["days"] / both[0]["training"]["days"]
    per_token = both[1]["step_time_s"] / both[0]["step_time_s"] / 2
    assert ratio == pytest.approx(per_token)


# Progress.


class Watched(StringIO):
    """A terminal that keeps what it was shown."""

    def isatty(self) -> bool:
        return True


def test_progress_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, clock = Watched(), iter([0.0, 0.5, 2.0, 2.05, 20.0, 300.0, 600.0])
    monkeypatch.setattr("sys.stderr", watched)
    monkeypatch.setattr("shardsim.cli.output.time.monotonic", lambda: next(clock))
    tell = progress_line("searching")
    for done in (10, 10, 10, 10, 10):
        tell(done, 100)
    tell(100, 100)
    shown = [text.strip() for text in watched.getvalue().split("\r")]
    assert shown == [
        "",
        "searching: 10 %, about 18 s left",
        "searching: 10 %, about 3 min left",
        "searching: 10 %, about 45 min left",
        "",
        "",
    ]
    monkeypatch.setattr("sys.stderr", StringIO())
    progress_line("searching")(1, 2)  # nobody watches, and no clock is asked


def test_long_work_tells_how_far_it_is() -> None:
    plan = plan_of_mesh(ss.load_model("vit-s-16"), ss.parse_machine("v5e:2x2"), 64, {"fsdp": 4})
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    def all_told() -> list[int]:
        parts = [done for done, _ in told]
        assert parts == sorted(parts)
        assert told[-1][0] == told[-1][1]
        told.clear()
        return parts

    explain(plan, progress=progress)
    assert len(all_told()) > 20
    list(sweep(plan, [("batch", [32, 64])], progress=progress))
    assert all_told() == [1, 2]
    simulate_plan(plan, jitter=0.02, progress=progress)
    assert len(all_told()) > 1


def test_that_the_best_plan_has_no_program_is_said(shardsim: Shardsim) -> None:
    held = ("--fix", "mesh.stage=2", "--fix", "pipeline_schedule=1f1b")
    words = ("plan", "vit-b-16", "--on", "v5e:2x2", "--batch", "64", *held)
    said = shardsim(*words)
    assert said.exit_code == 0, said.output
    assert "the best plan has no exported program: pipeline_schedule: export of 1f1b" in said.stderr
    assert "no exported program" not in shardsim(*words[:6]).stderr
