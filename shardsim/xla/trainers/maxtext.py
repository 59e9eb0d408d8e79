"""An exported plan in MaxText itself: its ahead-of-time compile, or steps on host devices.

With `debug_sharding=true` MaxText prints the shape and the physical spec of every parameter and
every moment; its compile prints the compiler's memory analysis.
"""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardsim.emit.dialects.maxtext import Export, maxtext_export
from shardsim.emit.dialects.maxtext_file import maxtext_text
from shardsim.emit.dialects.maxtext_tables import state_paths
from shardsim.emit.dialects.rules import resolve_names
from shardsim.emit.shrink import shrink
from shardsim.emit.specs import plan_data
from shardsim.errors import ShardsimError
from shardsim.plan import Plan, resolve
from shardsim.plan.split import state_apart
from shardsim.xla.trainers.process import failure, run, trainer_python, versions
from shardsim.xla.trainers.result import Placed, Spec, TrainerResult, spec_of, with_collectives
from shardsim.xla.trainers.tiles import stored_bytes

STEPS = 3
_PACKAGES = ("maxtext", "jax", "libtpu", "flax")
_COMPILE = str(Path(__file__).with_name("maxtext_worker.py"))
_TRAIN = "maxtext.trainers.pre_train.train"
_SHOWN = re.compile(
    r"\] +(?P<path>[\w/]+)\n"
    r" +Shape: +(?P<dtype>\w+)\[(?P<shape>[\d,]*)\]\n"
    r"(?: +Logical: .*\n)?"
    r" +Physical: +(?P<spec>\(.*\))"
)
_STATE_PATH = re.compile(
    r"(?:model/|optimizer/opt_state/\d+/(?P<moment>mu|nu)/)?(?P<rest>(?:decoder|token_embedder)/.+)/value"
)
_MEMORY = re.compile(r"(\w+?)(?:_size)?_in_bytes=(\d+)")
_LOSS = re.compile(r"completed step: \d+.*?\bloss: ([-\d.naif]+)")


def verify_maxtext(
    plan: Plan, *, python: str | None, path: Path | None, scale: str, devices: int
) -> TrainerResult:
    """Compile the exported file for the plan's slice ("full"), or train its tiny copy ("tiny")."""
    if scale == "tiny":
        plan = shrink(plan, devices)[0]
    interpreter = trainer_python(python)
    hlo = None
    with tempfile.TemporaryDirectory(prefix="shardsim-maxtext-") as folder:
        found = versions(interpreter, _PACKAGES, folder)
        if "maxtext" not in found:
            raise ShardsimError(
                f"{interpreter} has no MaxText; give --trainer-python, the Python of an "
                "environment with pip install 'maxtext[tpu]'"
            )
        made = maxtext_export(plan, path or Path(interpreter).parent.parent)
        file = Path(folder) / "plan.yml"
        file.write_text(maxtext_text(plan, made), encoding="utf-8")
        options = [
            "debug_sharding=true",
            "run_name=shardsim",
            f"base_output_directory={folder}",
            "skip_jax_distributed_system=true",
            "jax_cache_dir=",
            "enable_checkpointing=false",
        ]
        if scale == "full":
            program = Path(folder) / "program.txt"
            command = [interpreter, "-P", _COMPILE, str(program), str(file), *options]
            code, text = run(command, folder)
            hlo = program.read_text(encoding="utf-8") if program.is_file() else None
        else:
            options += ["hardware=cpu", "dataset_type=synthetic", f"steps={STEPS}"]
            options += ["attention=dot_product", "compile_xla_flags=''"]
            command = [interpreter, "-m", _TRAIN, str(file), *options]
            code, text = run(command, folder, devices=made.plan.machine.devices)
    if code:
        raise ShardsimError(f"MaxText did not take the exported file: {failure(text)}")
    result = read_output(text, made, found)
    if scale == "tiny":
        return result
    sizes = dict(zip(made.mesh.names, made.mesh.inside, strict=True))  # a program is of one slice
    return with_collectives(result, hlo, sizes)


def read_output(text: str, made: Export, found: Mapping[str, str]) -> TrainerResult:
    """Return the result that MaxText's output shows."""
    placed, missing = _placed(text, made)
    memory: dict[str, int] = {}
    analysis = [line for line in text.splitlines() if "CompiledMemoryStats" in line]
    for key, value in _MEMORY.findall("\n".join(analysis)):
        memory.setdefault(key, int(value))
    return TrainerResult(
        against="maxtext",
        plan=made.plan,
        versions=found,
        parameters=placed,
        missing=missing,
        state_bytes=memory.get("alias"),  # the state is donated, the batch is not
        exported_state_bytes=_state_bytes(made) if memory else None,
        peak_bytes=memory.get("peak_memory") or None,
        allocated_bytes=memory.get("temp"),
        losses=[float(value) for value in _LOSS.findall(text)],
        differences=made.differences,
        remarks=made.remarks,
    )


def _placed(text: str, made: Export) -> tuple[list[Placed], list[str]]:
    """Return every parameter and moment that MaxText printed, and the weights it did not."""
    paths = state_paths(made.block)
    wanted = {
        array.what: (array.spec, spec_of(resolve_names(array.names, made.rules)))
        for array in made.arrays
        if not array.activation
    }
    stacked = {array.what for array in made.arrays if array.names[0] == "layers"}
    sizes = _axis_sizes(made)
    over_data = bool(state_apart(made.plan.model, resolve(made.plan)))
    rows, seen = [], set()
    for path, spec in _shown(text):
        match = _STATE_PATH.fullmatch(path)
        if match is None or (match["moment"] and over_data):
            continue
        weight = paths.get(match["rest"])
        if weight is None:
            continue
        seen.add(weight)
        planned, exported = (
            spec_of(_scanned(one, weight in stacked), sizes) for one in wanted[weight]
        )
        name = f"{weight} ({match['moment']})" if match["moment"] else weight
        rows.append(Placed(name, planned, exported, spec_of(spec, sizes)))
    return rows, sorted(set(wanted) - seen)


def _shown(text: str) -> Iterator[tuple[str, Spec]]:
    """Yield path and spec of every array that MaxText printed; missing dimensions are whole."""
    for match in _SHOWN.finditer(text):
        rank = len([size for size in match["shape"].split(",") if size])
        entries = ast.literal_eval(match["spec"])
        spec = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in entries]
        yield match["path"], spec_of(spec, rank=rank)


def _scanned(spec: Spec, stacked: bool) -> Spec:
    """Return a spec with the layers' dimension second, where `param_scan_axis` puts it."""
    if not stacked or len(spec) < 2:
        return spec
    return (spec[1], spec[0], *spec[2:])


def _axis_sizes(made: Export) -> dict[str, int]:
    return {
        made.renamed[name]: size
        for name, size in zip(made.mesh.names, made.mesh.sizes, strict=True)
    }


def _state_bytes(made: Export) -> float:
    """Return the bytes of parameters and moments on one device, as the exported rules lay them."""
    data = plan_data(made.plan)
    sizes = _axis_sizes(made)
    names = {array.what: array.names for array in made.arrays if not array.activation}
    element_bytes = {"f32": 4.0, "bf16": 2.0}[made.plan.precision.parameters]
    layout = resolve(made.plan)
    ways = int(layout.data.size) if state_apart(made.plan.model, layout) else 1
    return sum(
        stored_bytes(
            entry["shape"],
            resolve_names(names[name], made.rules),
            sizes,
            made.plan.optimizer,
            element_bytes=element_bytes,
            state_ways=ways,
        )
        for name, entry in data["parameters"].items()
    )
