"""The compile service: real small compiles, its cache, and everything that can go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_step import small_plan

from shardsim.errors import HardwareError, ShardsimError
from shardsim.machine import parse_machine
from shardsim.xla.tpu import Cache, TpuCompiler, service, topology_options
from shardsim.xla.tpu import cache as tpu_cache
from shardsim.xla.tpu.cache import key_of
from shardsim.xla.tpu.service import compile_once, hbm_needed, run_compiler

needs_libtpu = pytest.mark.skipif(
    not service.find_spec("libtpu"), reason="libtpu is not installed (Linux on x86-64 only)"
)


@needs_libtpu
@pytest.mark.parametrize("machine", ["v4:2x2x1", "v5e:2x2"])
def test_a_plan_compiles_for_a_slice_that_is_not_there(
    machine: str, compilations: Cache, tmp_path: Path
) -> None:
    plan = small_plan(machine)
    # That for v4 is compiled for other tests too.
    cache = compilations if machine.startswith("v4") else Cache(tmp_path)
    with TpuCompiler(cache=cache) as compiler:
        made = compiler.compile(plan)
        again = compiler.compile(replace(plan, name="the same under another name"))
    assert made.ok, made.problem
    assert made.text is not None
    assert "is_scheduled=true" in made.text[:300]
    # float32 weights and AdamW's two moments over four devices, and an equal share of images.
    state = 12 * plan.model.parameters / 4
    assert state < made.result["memory"]["argument_size"] < 1.6 * state
    assert made.peak_bytes is not None
    assert made.peak_bytes >= made.result["memory"]["argument_size"]
    assert set(made.versions) == {"jax", "libtpu"}
    assert again.cached
    assert not made.cached or cache is compilations
    assert again.text == made.text


@needs_libtpu
def test_what_does_not_fit_says_how_much_it_needs(compilations: Cache) -> None:
    plan = small_plan(batch=2**22)
    with TpuCompiler(cache=compilations) as compiler:
        made = compiler.compile(plan)
    assert not made.ok
    assert made.does_not_fit
    assert made.peak_bytes is not None
    assert made.peak_bytes > plan.machine.chip.hbm_usable_bytes
    assert "GiB HBM on a device" in made.problem


@needs_libtpu
def test_an_unknown_compiler_option_is_named() -> None:
    with TpuCompiler() as compiler:
        made = compiler.compile(small_plan(), options={"xla_tpu_make_it_fast": "true"})
    assert not made.ok
    assert not made.does_not_fit
    assert "xla_tpu_make_it_fast" in made.problem


def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the service start a process that only sleeps, instead of a compiler."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def left_over() -> list[Path]:
    return list(Path(service.tempfile.gettempdir()).glob("shardsim-tpu-*"))


def test_a_compilation_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_over()
    sleeper(tmp_path, monkeypatch)
    result, text = run_compiler({}, "", timeout_s=0.5, memory_bytes=1e12)
    assert result == {"error": "stopped", "message": "not compiled within 0 s"}
    assert text is None
    assert left_over() == before


def test_a_compilation_that_takes_too_much_memory_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper(tmp_path, monkeypatch)
    result, _ = run_compiler({}, "", timeout_s=60, memory_bytes=1)
    assert result["error"] == "stopped"
    assert "memory" in result["message"]


def test_leaving_ends_what_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "find_spec", lambda name: True)
    sleeper(tmp_path, monkeypatch)
    before = left_over()
    futures: list[Any] = []

    def interrupted() -> None:
        with TpuCompiler(workers=2) as compiler:
            pool: Any = compiler._executor
            futures.extend(pool.submit(run_compiler, {}, "", 600, 1e12) for _ in range(4))
            while len(service._running) < 2:
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(future.done() for future in futures)
    assert not service._running
    assert left_over() == before


def test_a_crash_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho the compiler fell over\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    result, _ = run_compiler({}, "", timeout_s=60, memory_bytes=1e12)
    assert result["error"] == "crashed"
    assert "fell over" in result["message"]


def test_without_libtpu_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    with pytest.raises(ShardsimError, match=r"shardsim\[tpu\]"):
        TpuCompiler()


def test_compilations_side_by_side_keep_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through any executor; results come as they are done, each with its plan's index."""

    def fake(request: dict[str, Any], code: str, *limits: float) -> Any:
        name = request["topology"]["topology_name"]
        return {"versions": {}, "memory": {"peak_memory": len(name)}, "name": name}, name

    monkeypatch.setattr(service, "run_compiler", fake)
    plans = [small_plan(machine) for machine in ("v4:2x2x1", "v5e:2x2", "v6e:2x2")]
    with ThreadPoolExecutor(3) as pool, TpuCompiler(executor=pool, cache=Cache(tmp_path)) as both:
        found = dict(both.compile_all(plans))
    assert sorted(found) == [0, 1, 2]
    for index, plan in enumerate(plans):
        assert found[index].plan is plan
        assert found[index].text == plan.machine.name


def test_the_key_changes_with_everything_that_matters() -> None:
    request = {"topology": {"topology_name": "v4:2x2x1"}, "options": {"a": "true"}}
    base = key_of(request, "code", {"jax": "1"})
    assert base == key_of(json.loads(json.dumps(request)), "code", {"jax": "1"})
    others = [
        key_of({**request, "options": {"a": "false"}}, "code", {"jax": "1"}),
        key_of({**request, "topology": {"topology_name": "v4:2x2x2"}}, "code", {"jax": "1"}),
        key_of(request, "code ", {"jax": "1"}),
        key_of(request, "code", {"jax": "2"}),
    ]
    assert len({base, *others}) == 5


def test_a_damaged_entry_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("k") is None
    cache.put("k", {"memory": {}}, "text")
    assert cache.get("k") == ({"memory": {}}, "text")
    (tmp_path / "k" / "hlo.txt.gz").write_bytes(b"\x1f\x8b damaged")
    assert cache.get("k") is None
    cache.put("k", {"memory": {}}, "text again")
    assert cache.get("k") == ({"memory": {}}, "text again")
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


@pytest.mark.parametrize("text", ["null", "{}", "[]", "{", '{"error": 1}', '{"memory": 5}', ""])
def test_an_entry_with_another_result_is_none(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path)
    cache.put("k", {"memory": {}}, "text")
    (tmp_path / "k" / "sha256").unlink()
    (tmp_path / "k" / "result.json").write_text(text, encoding="utf-8")
    assert cache.get("k") is None
    assert "k" not in cache


@pytest.mark.parametrize("where", ["", "file", "file/inside"])
def test_a_compilation_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(tmp_path / where)
    if where:
        assert cache.put("k", {"memory": {}}, "text").startswith(str(tmp_path / where))
        assert cache.get("k") is None
    else:  # what lies where the entry would is no entry: it makes room
        (tmp_path / "k").write_text("damaged")
        assert cache.put("k", {"memory": {}}, "text") == ""
        assert cache.get("k") == ({"memory": {}}, "text")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".new")] == []


def test_any_flipped_byte_makes_an_entry_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("k", {"memory": {"peak_memory": 123456}}, "text " * 20)
    for name in ("result.json", "hlo.txt.gz"):
        path = tmp_path / "k" / name
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert cache.get("k") is None, (name, at)
        path.write_bytes(whole)
    assert cache.get("k") is not None


def test_what_is_kept_is_listed_and_cleared(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in ("a", "b"):
        cache.put(key, {"memory": {}}, "text")
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "v4-1.jsonl").write_text("{}\n", encoding="utf-8")
    with cache.alone("c"):
        kinds = [entry.kind for entry in cache.entries()]
        assert sorted(kinds) == ["compilation", "compilation", "estimates"]
        assert sum(entry.size_bytes for entry in cache.entries()) == sum(
            path.stat().st_size for path in tmp_path.rglob("[!.]*") if path.is_file()
        )
        assert len(cache.clear()) == 3
        assert cache.entries() == []
        assert (tmp_path / ".lock-c").exists()


def test_of_two_that_want_the_same_one_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def fake(request: dict[str, Any], code: str, *limits: float) -> Any:
        compiled.append(code)
        time.sleep(0.1)
        return ({"error": "crashed", "message": ""} if code == "bad" else {"memory": {}}), "text"

    monkeypatch.setattr(service, "run_compiler", fake)
    monkeypatch.setattr(tpu_cache, "POLL_S", 0.01)
    with ThreadPoolExecutor(4) as pool:
        codes = ["a", "b", "a", "bad", "a", "bad"]
        found = [*pool.map(lambda code: compile_once({}, code, 1, 1, str(tmp_path)), codes)]
    assert sorted(compiled) == ["a", "b", "bad", "bad"]  # a crash says nothing of the next try
    assert [text for _, text in found] == ["text"] * 6
    assert len([*tmp_path.iterdir()]) == 2
    assert compile_once({}, "c", 1, 1, "/proc/no/such/place") == ({"memory": {}}, "text")


def test_a_killed_process_lets_go_of_what_it_compiled(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom shardsim.xla.tpu.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).alone('k') as alone:\n"
        "    print(alone, flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 2

    try:
        assert holder.stdout.readline() == "True\n"
        with Cache(tmp_path).alone("k", stopped) as alone:
            assert not alone
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with Cache(tmp_path).alone("k") as alone:
        assert alone
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("message", "needed", "offered"),
    [
        ("total memory required (159.30G) exceeds available HBM (30.75G).", 159.3, 30.75),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (81.62G) "
            "exceeds available HBM (31.25G).",
            81.62,
            31.25,
        ),
        ("Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.", 17.5, 15.75),
    ],
)
def test_out_of_memory_messages(message: str, needed: float, offered: float) -> None:
    used = hbm_needed(message)
    assert used is not None
    assert used == pytest.approx((needed * 2**30, offered * 2**30))


def test_other_messages_are_not_out_of_memory() -> None:
    assert hbm_needed("INVALID_ARGUMENT: No such compile option") is None


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        ("v4:8x8x16", {"topology_name": "v4:8x8x16", "chip_config_name": "megacore"}),
        ("v5e:16x16", {"topology_name": "v5e:16x16"}),
        ("2*v5e:16x16", {"topology_name": "v5e:16x16", "num_slices": 2}),
        ("tpu7x:4x4x4", {"topology_name": "tpu7x:4x4x4"}),
        (
            "v4:4x4x8_twisted",
            {
                "topology_name": "v4:4x4x8_twisted",
                "chip_config_name": "megacore",
                "wrap": [True, True, True],
            },
        ),
    ],
)
def test_slices_are_named_as_the_compiler_names_them(machine: str, options: dict[str, Any]) -> None:
    assert topology_options(parse_machine(machine)) == options


def test_only_tpus_are_compiled_for() -> None:
    with pytest.raises(HardwareError, match="knows only TPUs"):
        topology_options(parse_machine("h100:8"))


@needs_libtpu
@pytest.mark.parametrize(
    "machine", ["v2:2x2", "v3:4x4", "v4:4x4x8_twisted", "v5e:1x1", "2*v5p:2x2x1", "v6e:2x4"]
)
def test_the_compiler_knows_the_slice_as_we_do(machine: str) -> None:
    """As many devices, on as many slices, at every place of the torus."""
    wanted = parse_machine(machine)
    code = (
        "import json, sys\n"
        "from jax.experimental import topologies\n"
        "given = json.loads(sys.argv[1])\n"
        "devices = topologies.get_topology_desc(platform='tpu', **given).devices\n"
        "places = [[getattr(d, 'slice_index', None) or 0, *d.coords, d.core_on_chip]\n"
        "          for d in devices]\n"
        "print(json.dumps(places))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, json.dumps(topology_options(wanted))],
        capture_output=True,
        text=True,
        check=True,
        env=service.compiler_environment(Path("unused")) | {"XLA_FLAGS": "", "TMPDIR": "/tmp"},
    )
    places = json.loads(answer.stdout.splitlines()[-1])
    assert len(places) == wanted.devices
    assert len({tuple(place) for place in places}) == wanted.devices
    assert 1 + max(place[0] for place in places) == wanted.slices
    spans = [1 + max(place[1 + axis] for place in places) for axis in range(3)]
    assert spans[: len(wanted.shape)] == list(wanted.shape)


@needs_libtpu
def test_a_killed_parent_takes_its_compilations_along(tmp_path: Path) -> None:
    code = (
        "from shardsim.xla.tpu.service import run_compiler\n"
        "run_compiler({}, 'import time\\ntime.sleep(600)\\n', 600, 1e12)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=service.os.environ | {"TMPDIR": str(tmp_path)}
    )

    def workers() -> list[str]:
        lines = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout
        return [line for line in lines.splitlines() if str(tmp_path) in line and "worker" in line]

    deadline = time.monotonic() + 60
    try:
        while not workers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert workers()
    finally:
        parent.kill()
        parent.wait()
    while workers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers()
