"""Random inputs: each ends with a result or one clear line, never a traceback or half a file.

    python tests/fuzz.py [--runs 100000] [--seed 0] [--first 0] [--minutes M] [--only KIND]

Command lines, files of plans, models, chips, runs and settings, other trainers' configs, and kept
compilations, made and damaged at random (`fuzz_cases.py`), go to the commands in this process. Of
each it asks: exit status 0, 1, 2 or 130; with 2 one line of error, and no output and no new file;
no other exception, no warning of Python, nothing half-written, and no longer than a minute of a
processor (ten minutes of a busy machine's clock). What is found is made smaller and shown; exit
code 1 if anything is. A key of MaxText's has to be in the plan, refused or listed.

The same seed and number make the same case: `--first 1234 --runs 1` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from click.testing import CliRunner
from fuzz_cases import KINDS, MAXTEXT_VALUES, Case, case_of

from shardsim.cli.main import main
from shardsim.errors import ShardsimError
from shardsim.files import parse_yaml
from shardsim.machine.catalog import load_chip_file
from shardsim.xla.tpu.cache import Cache

HANG_S, WAIT_S = 60, 600  # of this process on a processor, and by the clock: others may be busy too
MEMORY_BYTES = 8 * 2**30
TRIES, TRIED_S = 300, 30.0  # to make a failing case smaller


class HangError(BaseException):
    """A case took longer than it may."""


@dataclass(frozen=True)
class Failure:
    """What was wrong with a case."""

    what: str  # the same for cases that fail for the same reason
    told: str


@contextlib.contextmanager
def inside(case: Case) -> Iterator[Path]:
    """Go into a new folder with a case's files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="shardsim-fuzz-") as name:
        folder = Path(name)
        for path, data in case.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def _too_long(*_: object) -> None:
    raise HangError


def run(case: Case) -> Failure | None:
    """Run a case; return what is wrong with what came out, if anything is."""
    for name in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(name, _too_long)
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    signal.alarm(WAIT_S)
    try:
        with inside(case) as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            return _called(case, folder) if case.reads == "chip" else _commanded(case, folder)
    except HangError:
        return Failure("hang", f"longer than {HANG_S} s of a processor, or {WAIT_S} s in all")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _called(case: Case, folder: Path) -> Failure | None:
    """Read the files by a call."""
    try:
        load_chip_file(folder / case.words[0])
    except ShardsimError as error:
        text = str(error)
        return None if text and "\n" not in text else Failure("lines", text)
    except Exception as error:
        return _raised(error)
    return None


def _commanded(case: Case, folder: Path) -> Failure | None:
    """Run the command, and look at everything that it leaves."""
    home = {"HOME": str(folder), "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None}
    home |= {"SHARDSIM_CACHE": str(folder / "kept"), "COLUMNS": "80"}
    runner = CliRunner(env={**home, **case.environment})
    result = runner.invoke(main, list(case.words), prog_name="shardsim")
    if isinstance(result.exception, MemoryError):
        return Failure("memory", f"more than {MEMORY_BYTES} bytes")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return _raised(result.exception)
    code, out, err = result.exit_code, result.stdout, result.stderr
    if code not in (0, 1, 2, 130):
        return Failure(f"exit {code}", err)
    for name, text in (("stdout", out), ("stderr", err)):
        if "Traceback" in text or not all(one.isprintable() for one in text.splitlines()):
            return Failure(f"what is no text on {name}", text[-2000:])
    new = [path for path in folder.rglob("*") if path.is_file()]
    new = [path for path in new if str(path.relative_to(folder)) not in case.files]
    if half := [path.name for path in new if path.name.startswith((".shardsim-", ".new-"))]:
        return Failure("half-written", f"{half}")
    if code == 2:
        lines = err.splitlines()
        if not lines or not lines[-1].startswith("error: ") or err.count("error: ") > 5:
            return Failure("no line of error", err)
        if sum(line.startswith("error: ") for line in lines) != 1 or len(lines[-1]) > 1100:
            return Failure("more than one line of error", err)
        written = any(word in case.words for word in ("-o", "--output", "--csv"))
        if (out or new) and not written:
            return Failure("output beside an error", out[:500] + str(new))
    for path in new:
        if problem := _file(path):
            return problem
    if "--json" in case.words and code in (0, 1) and out:
        try:
            json.loads(out)
        except ValueError:
            return Failure("no JSON", out[:500])
    if case.reads == "cache":
        return _cache(folder)
    return _maxtext(case, out) if code == 0 and "run.sh" in case.words[1:2] else None


def _file(path: Path) -> Failure | None:
    """Return what is wrong with a file that was written."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix in (".yaml", ".yml"):
            parse_yaml(path.read_text("utf-8"), path.name)
    except (ValueError, ShardsimError) as error:
        return Failure("a written file is damaged", f"{path.name}: {error}")
    return None


def _cache(folder: Path) -> Failure | None:
    kept = Cache(folder / "tpu")
    try:
        for path in (folder / "tpu").glob("*"):
            kept.get(path.name)
    except Exception as error:
        return _raised(error)
    return None


def _raised(error: BaseException) -> Failure:
    """Return an exception as a failure, called by its type and the last line of this project."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/shardsim/" in frame.filename]
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "elsewhere"
    text = "".join(traceback.format_exception(error)[-12:])
    return Failure(f"{type(error).__name__} at {at}", text)


def _maxtext(case: Case, out: str) -> Failure | None:
    """Return the first key of a script that changed nothing, and of which nothing was said."""
    try:
        found = json.loads(out)
    except ValueError:
        return None
    text = case.files["run.sh"].decode("utf-8", "replace")
    words = [part.partition("=")[0] for part in text.split() if "=" in part]
    listed = {item["key"] for item in found["not_carried"]}
    base = text.partition(" per_device_batch_size=4 ")
    if not base[1] or text.count("\n") != 3:
        return None
    for word in words[3:]:  # a variable of the environment is called M_ and the key
        key = word.removeprefix("M_").lower() if word.startswith("M_") else word
        if key in listed or not key.isidentifier() or key in _CARRIED:
            continue
        if not _counts(key, text.splitlines()[-1].partition(" per_device")[0]):
            return Failure(f"{key} is lost", f"{key}: in no plan, and not listed")
        _CARRIED.add(key)
    return None


_CARRIED = {"override_model_config"}  # of sizes that others say


def _counts(key: str, command: str) -> bool:
    """Return whether some value of a key makes another plan, is refused, or is listed."""
    usual = None
    for one in ("", *MAXTEXT_VALUES):
        more = f"{key}={one}" if one else ""
        with inside(Case((), {"run.sh": f"{command} per_device_batch_size=4 {more}\n".encode()})):
            words = ["import", "run.sh", "--from", "maxtext", "--on", "v5p:4x4x4", "--json"]
            result = CliRunner().invoke(main, words)
        if result.exit_code:
            if not one:
                return True  # the model itself is refused with what else is said of it
            if key in result.stderr:
                return True
            continue
        found = json.loads(result.stdout)
        if key in {item["key"] for item in found["not_carried"]}:
            return True
        usual = usual or found["plan"]
        if found["plan"] != usual:
            return True
    return False


def smaller(case: Case, failure: Failure) -> Case:
    """Return a case with fewer words and lines that fails for the same reason."""
    end, left = time.monotonic() + TRIED_S, TRIES
    better = True
    while better and left and time.monotonic() < end:
        better = False
        for other in _fewer(case):
            left -= 1
            if not left or time.monotonic() > end:
                break
            found = run(other)
            if found and found.what == failure.what:
                case, better = other, True
                break
    return case


def _fewer(case: Case) -> Iterator[Case]:
    for size in (2, 1):
        for at in range(1, len(case.words) - size + 1):
            yield replace(case, words=case.words[:at] + case.words[at + size :])
    for name, data in case.files.items():
        rest = {key: one for key, one in case.files.items() if key != name}
        if not any(name in word for word in case.words) or case.reads == "cache":
            yield replace(case, files=rest)
        lines = data.split(b"\n")
        for size in (len(lines) // 2, len(lines) // 4, 1):
            for at in range(0, len(lines) if size else 0, max(size, 1)):
                fewer = b"\n".join(lines[:at] + lines[at + size :])
                yield replace(case, files={**rest, name: fewer})


def shown(number: int, case: Case, failure: Failure) -> str:
    """Return a failing case as text."""
    used = {name: data for name, data in case.files.items() if any(name in w for w in case.words)}
    used = used if case.reads != "cache" else case.files
    told = [f"#{number}: {failure.what}", f"  words: {list(case.words)!r}"]
    told += [f"  environment: {case.environment}"] if case.environment else []
    told += [f"  {name}: {data[:1500]!r}" for name, data in used.items()]
    return "\n".join([*told, *("    " + line for line in failure.told.splitlines()[-14:])])


def main_() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", default="", choices=["", *(kind.__name__ for kind in KINDS)])
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    started, known = time.monotonic(), Counter[str]()
    slow: list[tuple[float, int, tuple[str, ...]]] = []
    done = 0
    for number in range(given.first, given.first + given.runs):
        if time.monotonic() - started > 60 * given.minutes:
            break
        case = case_of(given.seed, number, given.only)
        began = time.process_time()
        failure = run(case)
        slow = sorted([*slow, (time.process_time() - began, number, case.words)])[-5:]
        done += 1
        if failure is not None:
            known[failure.what] += 1
            if known[failure.what] == 1:
                print(shown(number, smaller(case, failure), failure), flush=True)
        if done % 1000 == 0:
            took = time.monotonic() - started
            print(f"{done:,} in {took:.0f} s, {sum(known.values())} wrong", flush=True)
    took, busy = time.monotonic() - started, time.process_time()
    print(f"{done:,} inputs of seed {given.seed}, {sum(known.values())} wrong")
    print(f"  in {took:.0f} s, {busy:.0f} s of them on a processor")
    for time_s, number, words in reversed(slow):
        print(f"  slow: {time_s:.1f} s, #{number}: {' '.join(words)[:120]!r}")
    for what, many in known.most_common():
        print(f"  {many} times {what}")
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main_())
