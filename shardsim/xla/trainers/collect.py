"""Compiles the MaxText programs of `programs.yaml` and keeps what their HBM holds, as data.

    python -m shardsim.xla.trainers.collect --python ~/maxtext/bin/python

compiles what is not in `programs.json` yet, one after another, and may be interrupted at any time;
`--only TEXT` takes those with TEXT in their ids, `--anew` also those that are there. One takes half
a minute to two minutes of one core and 3 GB: it ends when buffers are assigned, as the code that
the compiler generates afterwards changes none. A flag that the libtpu at hand refuses is left out,
and kept with the result.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsim.emit.dialects.maxtext_file import slice_name
from shardsim.errors import ShardsimError
from shardsim.files import write_text
from shardsim.xla.hlo.buffers import Assignment, read_assignment
from shardsim.xla.hlo.shapes import parse_shape
from shardsim.xla.tpu.service import without_tpu
from shardsim.xla.trainers.classes import classified
from shardsim.xla.trainers.process import LONGEST_S, failure, trainer_python, versions
from shardsim.xla.trainers.programs import ASKED, COMPILED, Program, compiled, programs

LISTED = 12  # of what is live at the peak, largest first
_PACKAGES = ("maxtext", "jax", "libtpu", "flax")
_COMPILE = "maxtext.trainers.pre_train.train_compile"
_STEP = "*.jit_train_step.*after_optimizations"
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%\S+ = (.+?) "
    r"(all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NO_ROOM = re.compile(r"CompileTimeHbmOom: [^.]*\.[^.]*\.[^.]*\.")
# What libtpu calls flags that it refuses, where it does not say their name.
_KNOWN_AS = {
    "Continuation fusion for AllGather": "xla_tpu_enable_async_collective_fusion_fuse_all_gather"
}


def row_of(program: Program, python: str, found: Mapping[str, str]) -> dict[str, Any]:
    """Compile a program, without flags that are refused; return what is kept of it."""
    flags = list(program.flags)
    refused: list[str] = []
    while True:
        with tempfile.TemporaryDirectory(prefix="shardsim-maxtext-") as folder:
            text = _compile(program, python, flags, Path(folder))
            row: dict[str, Any] = {
                "id": program.id,
                "date": datetime.date.today().isoformat(),
                "versions": dict(found),
                "refused_flags": refused,
            }
            dumps = _dumps(Path(folder))
            no_room = _NO_ROOM.search(text)
            if dumps is not None:
                row["compiled"] = no_room is None
                if no_room:
                    row["problem"] = no_room[0]
                return row | _assigned(program, *dumps)
        flag = _refused(text, flags)
        if flag is None:
            return row | {"compiled": False, "problem": failure(text)}
        flags.remove(flag)
        refused.append(flag)


def _compile(program: Program, python: str, flags: Sequence[str], folder: Path) -> str:
    """Start MaxText's compile; return what it printed when buffers are assigned or it ended."""
    base = subprocess.run(
        [python, "-c", "import maxtext.configs as c; print(list(c.__path__)[0])"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    ).stdout.strip()
    command = [
        *(python, "-P", "-m", _COMPILE, f"{base}/base.yml", *program.options),
        "run_name=shardsim",
        f"base_output_directory={folder}",
        "skip_jax_distributed_system=true",
        "jax_cache_dir=",
        "enable_checkpointing=false",
        f"compile_topology={slice_name(program.machine)}",
        f"compile_topology_num_slices={program.machine.slices}",
        *([f"compile_xla_flags={' '.join(f'--{flag}' for flag in flags)}"] if flags else []),
    ]
    environment = {key: value for key, value in without_tpu().items() if key != "PYTHONPATH"}
    environment["XLA_FLAGS"] = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text"
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            began = time.monotonic()
            while process.poll() is None and time.monotonic() - began < LONGEST_S:
                time.sleep(0.5)
                if any(folder.glob(f"dump/{_STEP}_after_buffer_assignment.txt")):
                    time.sleep(1.0)  # the last of the dumps
                    break
        finally:
            process.kill()
            process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _dumps(folder: Path) -> tuple[Assignment, str] | None:
    """Return the step's buffer assignment and its text, if it came that far."""
    texts = []
    for ending in ("-buffer-assignment", "-live-range", ""):
        files = sorted(folder.glob(f"dump/{_STEP}{ending}.txt"))
        if not files:
            return None
        texts.append(files[-1].read_text(encoding="utf-8"))
    return read_assignment(texts[0], texts[1]), texts[2]


def _assigned(program: Program, held: Assignment, text: str) -> dict[str, Any]:
    """Return what is kept of a buffer assignment and of the program's text."""
    there = classified(held, text, program.plan)
    sums: dict[str, int] = {"state": held.arguments_bytes + held.constants_bytes}
    for kind, buffer in there:
        sums[kind] = sums.get(kind, 0) + buffer.size_bytes
    return {
        "peak_bytes": held.peak_bytes,
        "allocated_bytes": held.allocated_bytes,
        "arguments_bytes": held.arguments_bytes,
        "host_bytes": held.host_bytes,
        "at_peak": dict(sorted(sums.items(), key=lambda item: -item[1])),
        "largest": [[b.size_bytes, kind, b.shape] for kind, b in there[:LISTED]],
        "collectives": _collectives(text, program.plan.model.layers),
    }


def _collectives(text: str, layers: int) -> list[dict[str, Any]]:
    """Return collectives by kind and by whether anything may run meanwhile, times in a step.

    Those in the loops over `layers` count that often. An operation that the compiler cut into
    pieces, each beside another fusion, keeps its channel.
    """
    found: dict[str, tuple[str, str, float, int]] = {}
    inside = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = line
        match = _COLLECTIVE.match(line)
        channel = _CHANNEL.search(line)
        if match is None or channel is None:
            continue
        alone = "fused_computation" not in inside and not match[3]
        how = "synchronous" if alone else "asynchronous"
        trips = layers if "while/body" in line else 1
        size = max(array.bytes for array in parse_shape(match[1]).arrays)
        found[channel[1]] = match[2], how, size, trips
    sums: dict[tuple[str, str], list[float]] = {}
    for kind, how, size, trips in found.values():
        each = sums.setdefault((kind, how), [0, 0.0])
        each[0] += trips
        each[1] += size * trips
    return [
        {"kind": kind, "how": how, "count": count, "array_bytes": round(size)}
        for (kind, how), (count, size) in sorted(sums.items())
    ]


def _refused(text: str, flags: Sequence[str]) -> str | None:
    """Return the flag that a failed compile's output complains of."""
    for words, name in _KNOWN_AS.items():
        if words in text:
            text += f" {name}"
    problem = failure(text) + text[-2000:]
    named = [flag for flag in flags if re.search(rf"{flag.partition('=')[0]}\b", problem)]
    return named[0] if named else None


def main() -> None:
    """Compile what is missing."""
    parser = argparse.ArgumentParser(description="MaxText programs, compiled and kept.")
    parser.add_argument("--python", required=True, help="the Python of MaxText's environment")
    parser.add_argument("--only", default="", metavar="TEXT", help="ids that have TEXT in them")
    parser.add_argument("--anew", action="store_true", help="also what is there")
    parser.add_argument("--programs", type=Path, default=ASKED)
    parser.add_argument("-o", "--output", type=Path, default=COMPILED)
    options = parser.parse_args()
    rows = compiled(options.output)
    python = trainer_python(options.python)
    found = versions(python, _PACKAGES, tempfile.gettempdir())
    wanted = [
        one
        for one in programs(options.programs)
        if options.only in one.id and (options.anew or one.id not in rows)
    ]
    print(f"{len(rows)} programs are there, {len(wanted)} to compile", file=sys.stderr)
    for number, program in enumerate(wanted, 1):
        began = time.monotonic()
        try:
            row = row_of(program, python, found)
        except ShardsimError as error:
            print(f"{program.id}: {error}", file=sys.stderr, flush=True)
            continue
        rows[program.id] = row
        kept = {"programs": [rows[name] for name in sorted(rows)]}
        write_text(str(options.output), json.dumps(kept, indent=1) + "\n")
        peak = row.get("peak_bytes")
        said = f"{peak / 2**30:.2f} GiB" if peak else ""
        said += f" {row['problem']}" if "problem" in row else ""
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{number}/{len(wanted)} {program.id}: {said}, {took}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
