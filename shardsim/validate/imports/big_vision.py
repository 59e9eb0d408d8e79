"""A big_vision config as a plan: a Python file, of which only literals are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsim.carried import NotCarried
from shardsim.emit.dialects import big_vision_tables as tables
from shardsim.emit.dialects.tactics import resolve_tactics
from shardsim.errors import FileError, nearest
from shardsim.machine import Machine, parse_machine
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.remat import Remat

# Sizes by letter (models/vit.py, decode_variant): width, depth, mlp, heads.
VARIANTS: Mapping[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
_IMAGE = re.compile(r"(?:inception_crop|central_crop|random_crop|resize)\((\d{1,4})\b")
_UNKNOWN = object()


def read_big_vision(
    path: Path, text: str, machine: str | None, image: int | None
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a big_vision config, how it was read, and what is not carried."""
    if machine is None:
        raise FileError("a big_vision config names no slice; give it: --on v4:8x8x16")
    slices = parse_machine(machine)
    config, strings = _read(text, path)
    notes: list[str] = []
    if config.get("model_name", "vit") != "vit":
        raise FileError(f"model_name: {config['model_name']!r} is not modelled; only vit is")
    pixels = image or config.get("IMAGE") or _image(strings, notes)
    model = _model(config, pixels, path)
    mesh = _mesh(config, slices)
    parameters, activations = _rules(config, model, mesh)
    options = config.get("model", {})
    batch = config.get("input.batch_size")
    if not isinstance(batch, int):
        raise FileError("config.input.batch_size: not a number that can be read")
    data = {
        "name": model["name"],
        "model": model,
        "machine": slices.name,
        "batch": batch,
        "mesh": {name: {"size": size} for name, size in mesh.items()},
        "rules": {"parameters": parameters, "activations": activations},
        "remat": _remat(options, notes).to_data(),
        "precision": {"compute": "bf16" if options.get("dtype_mm") == "bfloat16" else "f32"},
        "optimizer": _optimizer(config),
        "attention": "unfused",
        "execution": "partitioned",
    }
    return plan_from_data(data, str(path)), notes, []


def _read(text: str, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what the file assigns to `config` by dotted name, and every string in it."""
    try:
        tree = ast.parse(text)
        constants = {
            node.targets[0].id: _value(node.value, {})
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        found = {name: value for name, value in constants.items() if value is not _UNKNOWN}
        config: dict[str, Any] = dict(found)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                name = _dotted(node.targets[0])
                value = _value(node.value, found)
                if name and value is not _UNKNOWN:
                    config[name] = value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = _dotted(node.func.value)
                if name and node.func.attr == "update" and isinstance(config.get(name), dict):
                    config[name] = {**config[name], **_keywords(node, found)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FileError(f"{path}: not a Python file that can be read") from None
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return config, strings


def _dotted(node: ast.expr) -> str | None:
    """Return `model` for `config.model`, `input.batch_size` for `config.input.batch_size`."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if parts and isinstance(node, ast.Name) and node.id == "config" else None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Return the value of a literal, a `dict(...)` of literals, or a name known to be one."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return _keywords(node, names)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return _UNKNOWN


def _keywords(call: ast.Call, names: Mapping[str, Any]) -> dict[str, Any]:
    values = {word.arg: _value(word.value, names) for word in call.keywords if word.arg}
    return {name: value for name, value in values.items() if value is not _UNKNOWN}


def _image(strings: list[str], notes: list[str]) -> int:
    sizes = [int(size) for text in strings for size in _IMAGE.findall(text)]
    if not sizes:
        raise FileError("no preprocessing says how large an image is; give it: --image 224")
    notes.append(f"images of {sizes[0]} pixels, from the preprocessing")
    return sizes[0]


def _model(config: Mapping[str, Any], image: int, path: Path) -> dict[str, Any]:
    given = config.get("model")
    if not isinstance(given, Mapping):
        raise FileError("config.model: not a dict of values that can be read")
    options = dict(given)
    variant = str(options.get("variant") or "")
    letter, _, patch = variant.partition("/")
    if letter:
        if letter not in VARIANTS:
            raise FileError(f"config.model.variant: {variant!r}{nearest(letter, VARIANTS)}")
        names = ("width", "depth", "mlp_dim", "num_heads")
        options = {**dict(zip(names, VARIANTS[letter], strict=True)), **options}
    if patch.isdigit():
        options.setdefault("patch_size", (int(patch), int(patch)))
    size = options.get("patch_size", (16, 16))
    if not isinstance(size, (tuple, list)) or len(set(size)) != 1:
        raise FileError(f"config.model.patch_size: {size!r}: only square patches are modelled")
    pools = {theirs: ours for ours, theirs in tables.POOLINGS.items()}
    pool = options.get("pool_type", "gap")
    if pool not in pools:
        raise FileError(f"config.model.pool_type: {pool!r} is not modelled{nearest(pool, pools)}")
    positions = {theirs: ours for ours, theirs in tables.POSITIONS.items()}
    classes = config.get("num_classes") or 0
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)[:60].lstrip("._-") or "vit",
        "family": "vit",
        "layers": options.get("depth", 12),
        "embed": options.get("width", 768),
        "mlp": options.get("mlp_dim") or 4 * options.get("width", 768),
        "heads": options.get("num_heads", 12),
        "patch": size[0],
        "image": image,
        "pooling": pools[pool],
        "classes": classes if pool != "none" else 0,
        "positions": positions.get(options.get("posemb", "learn"), "learned"),
        "biases": True,
    }


def _mesh(config: Mapping[str, Any], machine: Machine) -> dict[str, int]:
    given = config.get("mesh", [("data", machine.devices)])
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
    config: Mapping[str, Any], model: Mapping[str, Any], mesh: Mapping[str, int]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the plan's rules: what the strategy does to the large weights of a block."""
    given = dict(config.get("sharding_rules") or [("act_batch", "data")])
    by = {name: _axes(given.get(name)) for name in ("act_batch", "act_len", "act_emb")}
    strategy = [tuple(row) for row in config.get("sharding_strategy") or [(".*", "replicate")]]
    width, mlp, heads = model["embed"], model["mlp"], model["heads"]
    layers = model["layers"]
    query = resolve_tactics(
        f"params/{tables.PATHS['query']}",
        (layers, width, heads, width // heads),
        4,
        strategy,
        mesh,
    )
    inside = resolve_tactics(
        f"params/{tables.PATHS['mlp_in']}", (layers, width, mlp), 4, strategy, mesh
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
    return (
        {name: axes for name, axes in parameters.items() if axes},
        {name: axes for name, axes in activations.items() if axes},
    )


def _axes(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else [str(axis) for axis in given or ()]


def _remat(options: Mapping[str, Any], notes: list[str]) -> Remat:
    """Return the policy; big_vision keeps everything of layers that it does not scan."""
    names = {theirs: ours for ours, theirs in tables.REMAT.items()}
    everything = names["everything_saveable"]
    if not options.get("scan", False):
        return Remat.of(save=everything)
    policy = options.get("remat_policy", "nothing_saveable")
    if policy not in names:
        notes.append(f"remat_policy: {policy!r} is not modelled; taken as nothing_saveable")
        policy = "nothing_saveable"
    return Remat.of(save=names[policy])


def _optimizer(config: Mapping[str, Any]) -> str:
    name = config.get("optax_name", "scale_by_adam")
    options = config.get("optax") or {}
    if name == "scale_by_adam":
        return "adamw-bf16-mu" if options.get("mu_dtype") == "bfloat16" else "adamw"
    found = [ours for ours, (theirs, _) in tables.OPTIMIZERS.items() if theirs == name]
    if not found:
        raise FileError(f"config.optax_name: {name!r} is not modelled")
    return found[0]
