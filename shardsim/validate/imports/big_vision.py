"""A big_vision config as a plan: a Python file, of which only literals are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, HBM, TIME, Keys, NotCarried, Reason, is_one_of
from shardsim.emit.dialects import big_vision_tables as tables
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.errors import FileError
from shardsim.files import read_text
from shardsim.machine import Machine, parse_machine
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.precision import wire
from shardsim.plan.remat import Remat
from shardsim.validate.imports.big_vision_models import known, model_of, tower_of
from shardsim.validate.imports.literals import CHANGES, read_python

_OFF = (False, None, 0, 0.0)
_IMAGE = re.compile(r"(?:inception_crop|central_crop|random_crop|resize)\((\d{1,4})\b")
_MOST_KEYS = 2_000
_MOMENT = "opt/0/0/mu/"  # in front of a weight's path, one of its moments
# Parts of a config that are in no plan: their names, why, and what they could change.
_LEFT: tuple[tuple[str, Reason], ...] = (
    (
        rf".*{re.escape(CHANGES)}",
        Reason("its file is not beside this one, so what it changes is not known", BOTH),
    ),
    (
        r"model\.rep_size",
        Reason("a dense layer in front of the classifier is not modelled", BOTH, _OFF),
    ),
    (r"model\.(\S*\.)?\w*dropout\w*", Reason("dropout is not modelled", BOTH, (0, 0.0))),
    (
        r"model\.(\S*\.)?(\w*softcap|head_zeroinit|temperature_init)",
        Reason("a few operations an element at most", (), ()),
    ),
    (r"model\..*", Reason("an option of the model that is not read", BOTH)),
    (r"(ema|ema_decay|polyak\w*)", Reason("a second copy of the weights", (HBM,), _OFF)),
    (r"(evals|fewshot|eval_\w+)(\..*)?", Reason("evaluation between steps is not modelled")),
    (r"(model_init|model_load|init_\w+)(\..*)?", Reason("what weights begin as; no work")),
    (
        r"(lr|wd|wd_mults|lr_mults|optax|schedule|grad_clip_norm|loss|mixup|label_smoothing|seed|"
        r"total_\w+|num_epochs|trial|weight_decay\w*|cooldown\w*|warmup\w*)(\..*)?",
        Reason("numbers of the optimizer and of losses; no work worth counting"),
    ),
    (
        r"(input\.)?(pp|data|cache|shuffle|prefetch|dataset|keep_only|pp_\w+|\w+_split|cache_\w+|"
        r"shuffle_\w+|prefetch_\w+|dataset_\w+|num_parallel_calls|pp_modules)(\..*)?",
        Reason("where images come from; of preprocessing the size of an image is read"),
    ),
    (
        "mesh_allow_split_physical_axes",
        Reason("axes are laid out by shardsim's own rule", (TIME,), _OFF),
    ),
    (
        r"(log|ckpt|checkpoint|keep_ckpt|keep_checkpoint|save_ckpt|profile|debug|wandb)\w*(\..*)?",
        Reason("for logs, profiles and checkpoints"),
    ),
)


def read_big_vision(
    path: Path, text: str, machine: str | None, image: int | None, arguments: str = ""
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a big_vision config, how it was read, and what is not carried.

    `arguments` are the config's own, as after the colon of `vit_i1k.py:variant=L/16`.
    """
    config = _read(text, path, arguments)
    notes: list[str] = []
    tower = tower_of(config)
    pixels = image or known(config, "IMAGE", None) or _image(config, text, notes)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].lstrip("._-") or "vit"
    model, left = model_of(config, pixels, name)
    if machine is None:  # what cannot be read at all is said first
        raise FileError("a big_vision config names no slice; give it: --on v4:8x8x16")
    slices = parse_machine(machine)
    mesh = _mesh(config, slices)
    rules = _rules(config, tower, model, mesh, left)
    compute = "bf16" if known(config, f"{tower}.dtype_mm", None) == "bfloat16" else "f32"
    data = {
        "name": model["name"],
        "model": model,
        "machine": slices.name,
        "batch": _batch(config),
        "mesh": {name: {"size": size} for name, size in mesh.items()},
        "rules": rules,
        "remat": _remat(config, tower, notes).to_data(),
        "microbatches": known(config, "grad_accum_steps", None) or 1,
        "precision": {"compute": compute, "reduce": wire(compute)},
        "optimizer": _optimizer(config),
        "attention": "unfused",
        "execution": "partitioned",
    }
    return plan_from_data(data, str(path)), notes, left + _left(config)


def _read(text: str, path: Path, arguments: str) -> Keys:
    """Return what the config says by dotted name: `model.width` for `config.model.width`."""
    try:
        nested, module, own = read_python(text, arguments, lambda name: _beside(path, name))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FileError(f"{path}: not a Python file that can be read") from None
    flat: dict[str, Any] = {"IMAGE": module["IMAGE"]} if "IMAGE" in module else {}
    waiting = [("", nested, 0)]
    while waiting:
        prefix, values, depth = waiting.pop()
        for name, value in values.items():
            if isinstance(value, dict) and value and depth < 8:
                waiting.append((f"{prefix}{name}.", value, depth + 1))
            else:
                flat[f"{prefix}{name}"] = value
            if len(flat) + len(waiting) > _MOST_KEYS:
                raise FileError(f"{path}: too long to be a config")
    own -= set() if "input.batch_size" in flat else {"batch_size"}  # where older configs have it
    return Keys({key: value for key, value in flat.items() if key not in own}, {})


def _beside(path: Path, module: str) -> str | None:
    """Return the text of a module of the tree that a config is in, or of a file beside it, as an
    export is; parse_arg is known anyway."""
    if re.fullmatch(r"\w{1,100}", module) and os.path.isfile(path.with_name(f"{module}.py")):
        return read_text(path.with_name(f"{module}.py"))
    if not re.fullmatch(r"big_vision(\.\w+){1,8}", module) or module.endswith("configs.common"):
        return None
    inside = Path(*module.split(".")).with_suffix(".py")
    tree = (folder for folder in path.absolute().parents if folder.name == "big_vision")
    found = next(
        (root.parent / inside for root in tree if os.path.isfile(root.parent / inside)), None
    )
    return read_text(found) if found is not None else None


def _plain(value: Any) -> Any:
    """Return a value as data; what is none is nothing."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def _batch(config: Keys) -> int:
    """Return the images of a step; older configs have them outside `input`."""
    key = "input.batch_size" if "input.batch_size" in config else "batch_size"
    batch = known(config, key, None)
    if not isinstance(batch, int) or isinstance(batch, bool):
        raise FileError("config.input.batch_size: not a number that can be read")
    return batch


def _left(config: Keys) -> list[NotCarried]:
    """Return what of a config nothing has read."""
    left = []
    for key in config.unread():
        value = config.given[key]
        shown = _plain(value)
        reason = next(
            (reason for pattern, reason in _LEFT if re.fullmatch(pattern, key)),
            Reason("not a key that is read", BOTH),
        )
        left.append(reason.of(key, shown))
    return left


def _image(config: Keys, text: str, notes: list[str]) -> int:
    """Return the pixels along an image: those of the training data, else of the first crop."""
    told = [config.given.get(key) for key in ("input.pp", "pp_train")]
    texts = [value for value in told if isinstance(value, str)]
    sizes = [int(size) for one in (*texts, text) for size in _IMAGE.findall(one)]
    if not sizes:
        raise FileError("no preprocessing says how large an image is; give it: --image 224")
    last = [int(size) for one in texts for size in _IMAGE.findall(one)][-1:]
    size = (last or sizes)[0]
    notes.append(f"images of {size} pixels, from the preprocessing")
    return size


def _mesh(config: Keys, machine: Machine) -> dict[str, int]:
    given = known(config, "mesh", [("data", machine.devices)])
    try:
        sizes = {str(name): int(size) for name, size in given}
    except (TypeError, ValueError):
        raise FileError(f"config.mesh: {given!r}: expected pairs of name and size") from None
    open_axes = [name for name, size in sizes.items() if size == -1]
    rest = machine.devices
    for size in sizes.values():
        rest //= size if size > 0 else 1
    return {name: rest if name in open_axes else size for name, size in sizes.items()}


def _rules(
    config: Keys,
    tower: str,
    model: Mapping[str, Any],
    mesh: Mapping[str, int],
    left: list[NotCarried],
) -> dict[str, dict[str, list[str]]]:
    """Return the plan's rules: what the strategy does to the large weights of a block."""
    given = dict(known(config, "sharding_rules", None) or [("act_batch", "data")])
    by = {name: _axes(given.get(name)) for name in ("act_batch", "act_len", "act_emb")}
    rows = known(config, "sharding_strategy", None) or [(".*", "replicate")]
    strategy = [tuple(row) for row in rows]
    if tower != "model" and [row[0] for row in strategy] != [".*"]:
        why = "read for the layers of the tower of images; other stacks are taken to lie alike"
        left.append(NotCarried("sharding_strategy", rows, why, BOTH))
    part = tower.removeprefix("model").removeprefix(".").replace("image", "img")
    root = "params" + (f"/{part}" if part else "")
    width, mlp, heads = model["embed"], model["mlp"], model["heads"]
    layers = model["layers"]
    path, shape = f"{root}/{tables.PATHS['query']}", (layers, width, heads, width // heads)
    query = resolve_tactics(path, shape, strategy, mesh)
    moment = resolve_tactics(_MOMENT + path, shape, strategy, mesh)
    inside = resolve_tactics(
        f"{root}/{tables.PATHS['mlp_in']}", (layers, width, mlp), strategy, mesh
    )
    split = [axis for axes in (*query, *inside) for axis in axes]
    sharded = [axis for axis in dict.fromkeys(split) if axis in by["act_batch"]]
    tensor = [axis for axis in dict.fromkeys(split) if axis not in by["act_batch"]]
    parameters = {"embed": sharded, "heads": tensor, "mlp": tensor, "vocab": tensor}
    activations = {
        "batch": by["act_batch"],
        "seq": by["act_len"],
        "embed": [axis for axis in by["act_emb"] if axis in tensor],
        "heads": tensor,
        "mlp": tensor,
    }
    data = [axis for axis in by["act_batch"] if axis not in sharded]
    more = [axis for axes in moment for axis in axes if axis in data]
    if more and set(more) != set(data):
        why = f"split over {', '.join(data)} or none of them, not over {', '.join(more)} alone"
        left.append(NotCarried("sharding_strategy: opt/.*", rows, why, BOTH))
        more = []
    made = {
        "parameters": parameters,
        "activations": activations,
        "optimizer": {"embed": [axis for axis in data if axis in more]},
    }
    found = {
        kind: {name: axes for name, axes in rules.items() if axes} for kind, rules in made.items()
    }
    return {kind: rules for kind, rules in found.items() if rules}


def _axes(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else [str(axis) for axis in given or ()]


def _remat(config: Keys, tower: str, notes: list[str]) -> Remat:
    """Return the policy; big_vision keeps everything of layers that it does not scan."""
    names = {theirs: ours for ours, theirs in tables.REMAT.items()}
    everything = names["everything_saveable"]
    if not known(config, f"{tower}.scan", False):
        return Remat.of(save=everything)
    policy = known(config, f"{tower}.remat_policy", "nothing_saveable")
    if not is_one_of(policy, names):
        notes.append(f"remat_policy: {policy!r} is not modelled; taken as nothing_saveable")
        policy = "nothing_saveable"
    return Remat.of(save=names[policy])


def _optimizer(config: Keys) -> str:
    name = known(config, "optax_name", "scale_by_adam")
    if name == "scale_by_adam":
        mu = known(config, "optax.mu_dtype", None)
        return "adamw-bf16-mu" if mu == "bfloat16" else "adamw"
    found = [ours for ours, (theirs, _) in tables.OPTIMIZERS.items() if theirs == name]
    if not found:
        raise FileError(f"config.optax_name: {name!r} is not modelled")
    return found[0]
