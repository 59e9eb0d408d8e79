"""Mutants: small wrong changes to the modules that hold physics, each of which a test must notice.

    python tests/mutants.py [--count 60] [--seed 0] [--only PATH ...] [--jobs 2] [--seconds S]

Each mutant is one change of one expression: another constant, operator, comparison, role, kind or
size, a term or factor or statement left out, a condition turned round. The same seed chooses the
same mutants of the same code. Each runs in a copy of the tree against the tests of its module
(`MODULES`), nearest first, until one fails. Texts that a command rewrites are not among them: only
assertions count. Answers are kept in `.mutants.jsonl`, so a run that was interrupted goes on where
it stopped, and after a change of the tests only survivors and what changed run again. Exit code 1
if a mutant survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from math import inf
from pathlib import Path
from queue import SimpleQueue

from mutations import Finder, Mutant

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutants.jsonl"

# Which modules are mutated (patterns; the first that matches counts), and the tests that must
# notice: files nearest to it, run by themselves first, then whole folders.
FOLDERS = ("tests/program", "tests/cost")
REPLAY_TESTS = (
    "tests/cost/test_replay.py",
    "tests/xla/hlo/test_compiled_replay.py",
    "tests/simulate/test_compiled_steps.py",
)
PRICE_TESTS = (
    "tests/cost/test_hiding.py",
    "tests/cost/test_price.py",
    "tests/cost/test_warnings.py",
    "tests/program/test_overlap.py",
)
HBM_TESTS = ("tests/cost/test_kept.py", "tests/cost/test_hbm.py", "tests/program/test_liveness.py")
PROGRAM_TESTS = ("tests/program/test_op_traffic.py", "tests/program/test_program_collectives.py")
RING_TESTS = ("tests/program/test_rings.py", "tests/program/test_overlap.py")
KERNEL_TESTS = ("tests/cost/test_kernels_measured.py",)
PIPELINE_TESTS = ("tests/simulate/test_pipeline.py",)
MODULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shardsim/cost/words.py", ()),  # prints
    ("shardsim/program/liveness.py", HBM_TESTS),
    ("shardsim/program/sized.py", HBM_TESTS),
    ("shardsim/program/holds.py", HBM_TESTS),
    ("shardsim/program/kept.py", HBM_TESTS),
    ("shardsim/program/gpu_rules.py", ("tests/program/test_gpu_rules.py",)),
    ("shardsim/program/at_once.py", ("tests/program/test_gpu_rules.py", *HBM_TESTS)),
    ("shardsim/program/*rules.py", ("tests/program/test_passes.py", *RING_TESTS)),
    ("shardsim/program/rings.py", RING_TESTS),
    ("shardsim/program/rounds.py", ("tests/program/test_context.py",)),
    ("shardsim/program/kernels.py", ("tests/program/test_context.py", *PROGRAM_TESTS)),
    ("shardsim/program/overlap.py", RING_TESTS),
    ("shardsim/program/schedule.py", (*RING_TESTS, *REPLAY_TESTS)),
    ("shardsim/program/turns.py", PIPELINE_TESTS),
    ("shardsim/program/*.py", PROGRAM_TESTS),
    (
        "shardsim/graph/*.py",
        ("tests/program/test_stored.py", "tests/plan/test_layout.py", *PROGRAM_TESTS),
    ),
    ("shardsim/cost/collectives.py", ("tests/cost/test_collectives.py", *RING_TESTS)),
    ("shardsim/cost/network.py", ("tests/cost/test_collectives.py",)),
    (
        "shardsim/cost/costs.py",
        ("tests/cost/test_physical_costs.py", "tests/cost/test_compiler_costs.py", *KERNEL_TESTS),
    ),
    ("shardsim/cost/hbm.py", HBM_TESTS),
    ("shardsim/cost/account.py", HBM_TESTS),
    ("shardsim/cost/stays.py", HBM_TESTS),
    ("shardsim/cost/microbatches.py", HBM_TESTS),
    ("shardsim/cost/replay.py", REPLAY_TESTS),
    ("shardsim/cost/meshlinks.py", REPLAY_TESTS),
    ("shardsim/cost/task_times.py", REPLAY_TESTS),
    ("shardsim/cost/stages.py", PIPELINE_TESTS),
    ("shardsim/cost/*.py", PRICE_TESTS),
)

# Changes that change no result: (file, line with a mark where the change begins, what it becomes,
# why). Never what a test could see.
EQUIVALENT: tuple[tuple[str, str, str, str], ...] = (
    ("shardsim/cost/network.py", "whole: Number = |1", "2", "set before it is read"),
    (
        "shardsim/cost/price.py",
        "each_s = clock.layers[usual].value / np.where(np.greater(trips[-1], |0), trips[-1], 1)",
        "1",
        "one trip is divided by one either way",
    ),
    (
        "shardsim/cost/meshlinks.py",
        "stride=|1 if places[torus] == DCN else int(strides[places[torus]]),",
        "2",
        "of slices only how many there are is read",
    ),
    *(
        ("shardsim/program/liveness.py", around, "1", "in no trace: only its size is read")
        for around in (
            'found[array.name] = Live(f"{array.name}, for the head", size, |0, 0)',
            'found[array.name] = Live(f"{array.name}, for the head", size, 0, |0)',
            'found[f"d {out.name}"] = Live(f"d {out.name}, for the head", result, |0, 0)',
            'found[f"d {out.name}"] = Live(f"d {out.name}, for the head", result, 0, |0)',
            'sums.append(Live(f"float32 sums of d {array.name}", size, |0, 0))',
            'sums.append(Live(f"float32 sums of d {array.name}", size, 0, |0))',
        )
    ),
    (
        "shardsim/program/lower.py",
        "read = |low.elements(op.ins[0], place) * low.wire * stream.fused_reads",
        "(low.elements(op.ins[0], place) * low.wire)",
        "1 in all ops that there are",
    ),
)


def tests_of(path: str) -> tuple[str, ...]:
    """Return the tests that must notice a mutant of `path`."""
    for pattern, tests in MODULES:
        if Path(path).match(pattern):
            return (*tests, *FOLDERS) if tests else ()
    return ()


def candidates(only: list[str]) -> Iterator[tuple[str, list[Mutant]]]:
    """Yield every module that is mutated, with all of its mutants."""
    for file in sorted((ROOT / "shardsim").rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        if not tests_of(path) or (only and not any(path.startswith(each) for each in only)):
            continue
        found = Finder(path, file.read_text(encoding="utf-8")).found
        yield path, sorted(found)


def chosen(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """Return `count` mutants, spread over the modules by their number of places to change."""
    equal = {(path, around, after) for path, around, after, _ in EQUIVALENT}
    pools = []
    for _, mutants in candidates(only):
        mutants.sort(key=lambda mutant: _order(seed, mutant))
        # One mutant an expression before a second of the same.
        seen: dict[tuple[int, int], int] = {}
        turns = []
        for mutant in mutants:
            place = mutant.start, mutant.end
            turns.append(seen.get(place, 0))
            seen[place] = turns[-1] + 1
        ranked = sorted(zip(turns, mutants, strict=True), key=lambda pair: pair[0])
        pools.append([m for _, m in ranked if (m.path, m.around, m.after) not in equal])
    total = sum(len(pool) for pool in pools)
    picked: list[Mutant] = []
    for pool in pools:
        picked += pool[: max(1, round(count * len(pool) / total))]
    left = [m for pool in pools for m in pool if m not in set(picked)]
    for some in (picked, left):
        some.sort(key=lambda mutant: _order(seed, mutant))
    return sorted((picked + left)[:count])


def _order(seed: int, mutant: Mutant) -> str:
    """Return what mutants are sorted by: as if drawn, but the same whatever else changes."""
    return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()


class Copies:
    """Copies of the tree, one for each mutant that runs at the same time."""

    def __init__(self, many: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="shardsim-mutants-")
        self.free: SimpleQueue[Path] = SimpleQueue()
        ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for number in range(many):
            tree = Path(self.folder.name) / str(number)
            for name in ("shardsim", "tests"):
                shutil.copytree(ROOT / name, tree / name, ignore=ignored)
            for name in ("hardware", "plans", "docs", "README.md", "notebooks"):
                (tree / name).symlink_to(ROOT / name)
            shutil.copy(ROOT / "pyproject.toml", tree)
            self.free.put(tree)


class Runner:
    """Runs mutants, and ends what runs when it is told to stop."""

    def __init__(self, jobs: int, limit_s: float, seconds: float | None = None) -> None:
        self.copies = Copies(jobs)
        self.limit_s = limit_s
        self.last_start_s = time.monotonic() + (inf if seconds is None else seconds)
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def tests(self, tree: Path, tests: tuple[str, ...], first: str = "") -> tuple[str, str]:
        """Run `first`, then the files of `tests`, then its folders, until a test fails; return
        ("passed" | "failed" | "time", that test)."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no"]
        command += ["-p", "no:cacheprovider", "-m", "not jax and not slow"]
        command += ["--all-parameters", "-rfE"]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": ""}
        near = [test for test in tests if test.endswith(".py")]
        for batch in ([first] if first else [], near, tests[len(near) :]):
            if not batch:
                continue
            process = subprocess.Popen(
                [*command, *batch],
                cwd=tree,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            with self.lock:
                self.running.add(process)
            try:
                printed, _ = process.communicate(timeout=self.limit_s)
            except subprocess.TimeoutExpired:
                self.end(process)
                return "time", f"over {self.limit_s:.0f} s"
            finally:
                with self.lock:
                    self.running.discard(process)
            if process.returncode == 4 and batch == [first]:
                continue  # that test is no more
            if process.returncode not in (0, 5):
                by = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
                return "failed", by.group(1) if by else printed.strip()[-200:]
        return "passed", ""

    def mutant(self, mutant: Mutant, first: str) -> tuple[str, str]:
        """Return what the tests of a mutant's module say of it."""
        tree = self.copies.free.get()
        file = tree / mutant.path
        text = file.read_bytes()
        try:
            if self.stopped or time.monotonic() > self.last_start_s:
                return "stopped", ""
            _write(file, text[: mutant.start] + mutant.after.encode() + text[mutant.end :])
            return self.tests(tree, tests_of(mutant.path), first)
        finally:
            _write(file, text)
            self.copies.free.put(tree)

    def end(self, process: subprocess.Popen[str]) -> None:
        """End a run of tests with what it started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()

    def stop(self) -> None:
        """End all that runs."""
        self.stopped = True
        with self.lock:
            running = list(self.running)
        for process in running:
            self.end(process)


def _write(file: Path, text: bytes) -> None:
    """Write a module and forget what was compiled of it."""
    file.write_bytes(text)
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        cached.unlink()


@cache
def digest(tests: tuple[str, ...]) -> str:
    """Return what the answers of these tests depend on: the code, the tests and their helpers."""
    files = set((ROOT / "shardsim").rglob("*.py"))
    for test in tests:
        place = ROOT / test
        files |= set(place.rglob("*.py")) if place.is_dir() else {place}
    files |= set((ROOT / "tests").glob("*.py")) - {Path(__file__)}
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def depends_on(mutant: Mutant, answer: dict[str, str]) -> str:
    """Return the digest of what an answer rests on: of a killed mutant, on one file of tests."""
    file, found, _ = answer["by"].partition("::")
    killed = answer["verdict"] == "failed" and found and (ROOT / file).exists()
    return digest((file,) if killed else tests_of(mutant.path))


def kept_answers() -> dict[str, dict[str, str]]:
    """Return the last answer for each mutant."""
    answers: dict[str, dict[str, str]] = {}
    if KEPT.exists():
        for line in KEPT.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            answers[answer["key"]] = answer
    return answers


def shown(text: str, width: int = 60) -> str:
    """Return an expression on one line, cut to `width`."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def check_unchanged(runner: Runner, tests: tuple[str, ...], kept: set[str]) -> None:
    """Leave if a test fails without any mutant."""
    key = f"unchanged {digest(tests)}"
    if key in kept:
        return
    tree = runner.copies.free.get()
    start = time.monotonic()
    verdict, by = runner.tests(tree, tests)
    runner.copies.free.put(tree)
    print(f"unchanged: {verdict} in {time.monotonic() - start:.0f} s {by}", flush=True)
    if verdict != "passed":
        raise SystemExit(2)
    keep({"key": key, "digest": digest(tests), "verdict": verdict, "by": ""})


def keep(answer: dict[str, object]) -> None:
    """Add an answer to those that the next run knows."""
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(answer) + "\n")


def main() -> int:
    """Make mutants, run them and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", action="append", default=[], metavar="PATH", help="of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one mutant")
    parser.add_argument("--seconds", type=float, help="begin no mutant after so long")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    options = parser.parse_args()

    wanted = chosen(options.count, options.seed, options.only)
    if options.list:
        for mutant in wanted:
            print(f"{mutant.path}:{mutant.line}: {shown(mutant.before)} → {shown(mutant.after)}")
        return 0
    before = kept_answers()
    answers: dict[Mutant, dict[str, str]] = {}
    for mutant in wanted:
        kept = before.get(mutant.key)
        if kept and kept["digest"] == depends_on(mutant, kept):
            answers[mutant] = kept
    todo = [mutant for mutant in wanted if mutant not in answers]
    code = 0
    if todo:
        runner = Runner(options.jobs, options.limit, options.seconds)
        pool = ThreadPoolExecutor(options.jobs)
        try:
            tests = {test for mutant in todo for test in tests_of(mutant.path)}
            tests = sorted(tests, key=lambda test: (not test.endswith(".py"), test))
            check_unchanged(runner, tuple(tests), set(before))
            futures = {
                pool.submit(runner.mutant, mutant, _killer(before.get(mutant.key))): mutant
                for mutant in todo
            }
            for done in as_completed(futures):
                mutant = futures[done]
                verdict, by = done.result()
                if verdict == "stopped":
                    continue
                answers[mutant] = {"key": mutant.key, "verdict": verdict, "by": by}
                answers[mutant]["digest"] = depends_on(mutant, answers[mutant])
                keep(answers[mutant] | asdict(mutant))
                shown_as(mutant, answers[mutant])
        except KeyboardInterrupt:
            code = 130
            print("interrupted; the next run goes on from here")
            runner.stop()
        finally:
            pool.shutdown(cancel_futures=True)
    survivors = [mutant for mutant in wanted if answers.get(mutant, {}).get("verdict") == "passed"]
    print(f"\n{len(wanted)} mutants, {len(answers)} run, {len(survivors)} survived")
    for mutant in wanted:
        if mutant in answers and mutant not in todo:
            shown_as(mutant, answers[mutant])
    for mutant in survivors:
        print(f"SURVIVED {mutant.path}:{mutant.line}: {mutant.before} → {mutant.after}")
    return code or int(bool(survivors))


def _killer(kept: dict[str, str] | None) -> str:
    """Return the test that noticed a mutant the last time."""
    if kept is None or kept["verdict"] != "failed" or "::" not in kept["by"]:
        return ""
    return kept["by"]


def shown_as(mutant: Mutant, answer: dict[str, str]) -> None:
    said = {"passed": "SURVIVED", "failed": f"killed by {answer['by']}", "time": answer["by"]}
    print(
        f"{mutant.path}:{mutant.line}: {shown(mutant.before)} → {shown(mutant.after)}: "
        f"{said.get(answer['verdict'], answer['verdict'])}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
