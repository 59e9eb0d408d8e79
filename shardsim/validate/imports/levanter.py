"""A Levanter config as a plan: the `model` and `trainer` sections of its YAML.

Mesh axes are replica, data and model; the batch is split over the first two. Weights are split
where they name a Haliax axis of `fsdp_axis` (over data) or `tensor_parallel_axes` (over model).
Defaults are those of the classes of levanter 1.2 (`trainer.py`, `models/*.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsim.carried import BOTH, HBM, Keys, NotCarried, Reason, is_one_of
from shardsim.emit.dialects.levanter import MODELS
from shardsim.errors import FileError, nearest, shown
from shardsim.files import parse_yaml, read_yaml
from shardsim.machine import Machine, parse_machine
from shardsim.plan import Plan, plan_from_data
from shardsim.plan.precision import wire

# Entries of tokenizers, as their model cards and tokenizer files say.
VOCABULARIES: Mapping[str, int] = {
    "gpt2": 50_257,
    "EleutherAI/gpt-neox-20b": 50_277,
    "meta-llama/Llama-2-7b-hf": 32_000,
    "meta-llama/Llama-2-13b-hf": 32_000,
    "meta-llama/Llama-2-70b-hf": 32_000,
    "NousResearch/Llama-2-7b-hf": 32_000,
    "meta-llama/Meta-Llama-3-8B": 128_256,
    "meta-llama/Meta-Llama-3.1-8B": 128_256,
    "meta-llama/Llama-3.1-8B": 128_256,
    "mistralai/Mistral-7B-v0.1": 32_000,
}
_DEFAULTS: Mapping[str, Any] = {
    "trainer.train_batch_size": 512,
    "trainer.model_axis_size": 1,
    "trainer.replica_ici_axis_size": 1,
    "trainer.replica_dcn_axis_size": 1,
    "trainer.per_device_parallelism": -1,
    "trainer.mp": "f32",
    "trainer.fsdp_axis": "embed",
    "trainer.tensor_parallel_axes": None,
    "model.type": "gpt2",
    "model.gradient_checkpointing": True,
    "model.use_flash_attention": True,
    "model.attn_backend": None,
    "model.tie_word_embeddings": False,
    "model.use_bias": False,
    "optimizer.type": "adam",
}
_FORMATS = {"f32": "f32", "float32": "f32", "bf16": "bf16", "bfloat16": "bf16"}
_BACKENDS = {
    None: "flash",
    "default": "flash",
    "splash": "flash",
    "jax_flash": "flash",
    "vanilla": "unfused",
}
_TENSOR = {"mlp": "mlp", "heads": "heads", "kv_head": "heads", "kv_heads": "heads"}
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw"}
_MOST_KEYS = 2_000
INCLUDE = re.compile(r"(?m)^(\w+):[ \t]*!include[ \t]+(\S+)[ \t]*$")  # the trainer's own tag
_LEFT: tuple[tuple[str, Reason], ...] = (
    (
        r"trainer\.(axis_resources|parameter_axis_resources|axis_mapping)(\..*)?",
        Reason("rules of single Haliax axes are not read", BOTH),
    ),
    (r"trainer\.(model_averaging|ema\w*)(\..*)?", Reason("a second copy of the weights", (HBM,))),
    (
        r"trainer\.(quantization|fp8)(\..*)?",
        Reason("narrow formats of Levanter are not read", BOTH),
    ),
    (r"trainer\.batch_axis", Reason("the axis of the batch is not read", BOTH, ("batch",))),
    (
        r"trainer\.(tracker|wandb|id|seed|num_train_steps|steps_per_eval|max_eval\w*|checkpointer|"
        r"load_\w+|initialize_from\w*|jax_config|distributed|ray|require_accelerator|log_\w+|"
        r"shutdown_at_exit|run_base_dir|profiler\w*|watch|per_device_eval_parallelism|crash_\w+|"
        r"allow_\w+|hooks)(\..*)?",
        Reason("for logs, checkpoints, evaluation and the start of a run"),
    ),
    (r"trainer\..*", Reason("an option of the trainer that is not read", BOTH)),
    (
        r"use_hf_model_config",
        Reason("sizes of a checkpoint are not fetched: write them in model", BOTH, (False,)),
    ),
    (
        r"model\.(\w+_pdrop|scale_attn_by_inverse_layer_idx|use_layer_norm_weight)",
        Reason("dropout and the scale of scores are not modelled", ("time",), (0, 0.0, True)),
    ),
    (
        r"model\.(rope|rope_scaling|rope_theta)(\..*)?",
        Reason("angles of rotary positions; no work"),
    ),
    (
        r"model\.(initializer_range|layer_norm_epsilon|reference_checkpoint|tokenizer|upcast_attn)",
        Reason("numbers and names; no work worth counting"),
    ),
    (
        r"model\.(flash_attention_block_size|scan_layers|gradient_checkpointing_block_size)",
        Reason("how a kernel or a loop is cut is not modelled", BOTH),
    ),
    (r"model\..*", Reason("an option of the model that is not read", BOTH)),
    (
        r"(optimizer|data|hf_\w+|initialize_\w+|z_loss\w*|data_seed|out_\w+|epoch)(\..*)?",
        Reason("numbers of the optimizer, and where text and weights come from"),
    ),
)


def read_levanter(
    path: Path, text: str, machine: str | None
) -> tuple[Plan, list[str], list[NotCarried]]:
    """Return the plan of a Levanter config, how it was read, and what is not carried."""
    if machine is None:
        raise FileError("a Levanter config names no slice; give it: --on v4:4x4x4")
    slices = parse_machine(machine)
    config = _read(text, path)
    notes: list[str] = []
    model = _model(config, notes)
    mesh = _mesh(config, slices)
    parameters, activations = _rules(config, mesh)
    data = {
        "name": path.stem,
        "model": model,
        "machine": slices.name,
        "batch": config.count("trainer.train_batch_size"),
        "sequence": model["sequence"],
        "mesh": mesh,
        "rules": {"parameters": parameters, "activations": activations},
        "remat": _remat(config),
        "microbatches": _microbatches(config, mesh),
        "precision": _precision(config),
        "optimizer": _known(config, "optimizer.type", _OPTIMIZERS),
        "attention": _attention(config),
        "execution": "partitioned",
    }
    left = [_left(key, config.given[key]) for key in config.unread()]
    tensor = _names(config, "trainer.tensor_parallel_axes")
    if "model" in mesh and "vocab" not in tensor:
        why = "without vocab: a plan's tensor axis splits the vocabulary too"
        left.append(Reason(why, BOTH).of("trainer.tensor_parallel_axes", tensor))
    return plan_from_data(data, str(path)), notes, left


def _read(text: str, path: Path) -> Keys:
    """Return what the file says by dotted name; refuse a file of another kind."""
    data = _included(path, text)
    if not isinstance(data, Mapping) or not isinstance(data.get("model"), Mapping):
        raise FileError("no 'model' section: is this a config of levanter.main.train_lm?")
    if not isinstance(data.get("trainer"), Mapping):
        raise FileError("no 'trainer' section: is this a config of levanter.main.train_lm?")
    flat: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [(str(key), value) for key, value in data.items()]
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, Mapping) and value:
            waiting[:0] = [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
        if len(flat) > _MOST_KEYS:
            raise FileError(f"more than {_MOST_KEYS} keys")
    kind = flat.get("model.type", _DEFAULTS["model.type"])
    if not isinstance(kind, str) or kind not in MODELS:
        raise FileError(f"model.type: {shown(kind)} is not read{nearest(kind, MODELS)}")
    sizes = {f"model.{name}": size for name, size in MODELS[kind][1].items()}
    return Keys(flat, {**_DEFAULTS, **sizes})


def _included(path: Path, text: str) -> Any:
    """Return the file's keys, those of sections that it takes from files beside it among them."""
    files = {match[1]: path.parent / match[2] for match in INCLUDE.finditer(text)}
    data = parse_yaml(INCLUDE.sub(r"\1: null", text), str(path))
    for key, file in files.items():
        if isinstance(data, dict) and key in data:
            if not os.path.isfile(file):
                raise FileError(f"{key}: {shown(str(file.name))} is not beside the config")
            data[key] = read_yaml(file)
    return data


def _model(config: Keys, notes: list[str]) -> dict[str, Any]:
    kind = config["model.type"]
    options, _ = MODELS[kind]
    embed, heads = config.count("model.hidden_dim"), config.count("model.num_heads")
    if embed % heads:
        raise FileError(f"model: hidden_dim {embed} does not divide into {heads} heads")
    scale = "model.mlp_scale"
    mlp = config.count(scale) * embed if scale in config else config.count("model.intermediate_dim")
    found = {
        "name": kind,
        "family": "decoder",
        "causal": True,
        "layers": config.count("model.num_layers"),
        "embed": embed,
        "mlp": mlp,
        "heads": heads,
        "kv_heads": config.count_or("model.num_kv_heads", heads),
        "head_dim": embed // heads,
        "sequence": config.count("model.seq_len"),
        "vocab": _vocabulary(config, notes),
        **options,
    }
    if kind != "gpt2":
        found["tied_embeddings"] = config.flag("model.tie_word_embeddings")
        if config.flag("model.use_bias"):
            found["biases"] = True
    elif "model.use_bias" in config.given:
        found["biases"] = config.flag("model.use_bias")
    return found


def _vocabulary(config: Keys, notes: list[str]) -> int:
    """Return the entries of the tokenizer that a config names."""
    if "data.vocab_size" in config:
        return config.count("data.vocab_size")
    name = config["data.tokenizer"] if "data.tokenizer" in config else "gpt2"
    if not is_one_of(name, VOCABULARIES):
        raise FileError(
            f"data.tokenizer: the entries of {shown(name)} are not known; write them as "
            "data.vocab_size"
        )
    notes.append(f"data.tokenizer: {name} has {VOCABULARIES[name]:,} entries")
    return VOCABULARIES[name]


def _mesh(config: Keys, machine: Machine) -> dict[str, dict[str, Any]]:
    inside, over = (config.count(f"trainer.replica_{link}_axis_size") for link in ("ici", "dcn"))
    model = config.count("trainer.model_axis_size")
    if over not in (1, machine.slices):
        raise FileError(
            f"trainer.replica_dcn_axis_size: {over}, but {machine.name} has {machine.slices} slices"
        )
    if machine.slices > 1 and over == 1:
        raise FileError("trainer.replica_dcn_axis_size: 1, but the machine has several slices")
    data, rest = divmod(machine.devices, inside * over * model)
    if rest or not data:
        raise FileError(
            f"trainer: replica {inside * over} and model {model} do not divide the "
            f"{machine.devices} devices of {machine.name}"
        )
    sizes = {"replica": inside * over, "data": data, "model": model}
    return {name: {"size": size} for name, size in sizes.items() if size > 1} or {
        "data": {"size": 1}
    }


def _rules(
    config: Keys, mesh: Mapping[str, Any]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the plan's rules for parameters and activations."""
    split = _names(config, "trainer.fsdp_axis")
    if split and split != ["embed"]:
        raise FileError(f"trainer.fsdp_axis: only embed or null is read, not {shown(split)}")
    tensor = _names(config, "trainer.tensor_parallel_axes")
    parameters: dict[str, list[str]] = {"embed": ["data"]} if split and "data" in mesh else {}
    activations = {"batch": [name for name in ("replica", "data") if name in mesh]}
    if "model" in mesh:
        inside = {_TENSOR[axis] for axis in tensor if axis in _TENSOR}
        if inside != {"heads", "mlp"}:
            raise FileError(
                "trainer.tensor_parallel_axes: only heads and mlp together are read, not "
                f"{shown(tensor)}"
            )
        for name in ("heads", "mlp", "vocab"):
            parameters[name] = activations[name] = ["model"]
    return parameters, activations


def _names(config: Keys, key: str) -> list[str]:
    """Return a name, or a list of them, or nothing, as a list."""
    given = config[key]
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{key}: expected names of axes, found {shown(given)}")
    return names


def _microbatches(config: Keys, mesh: Mapping[str, Any]) -> int:
    each = config["trainer.per_device_parallelism"]
    if each == -1:
        return 1
    batch = config.count("trainer.train_batch_size")
    at_once = config.count("trainer.per_device_parallelism")
    for name in ("replica", "data"):
        at_once *= mesh[name]["size"] if name in mesh else 1
    if batch % at_once:
        raise FileError(
            f"trainer.train_batch_size: {batch} is no multiple of the {at_once} examples that the "
            "devices take at once"
        )
    return batch // at_once


def _remat(config: Keys) -> str:
    given = config["model.gradient_checkpointing"]
    if given not in (True, False, "full", "recompute", "save_all"):
        raise FileError(
            f"model.gradient_checkpointing: {shown(given)} is not read; only true and false are"
        )
    return "none" if given in (False, "save_all") else "full"


def _precision(config: Keys) -> dict[str, str]:
    """Return formats from a policy of jmp: `p=f32,c=bfloat16`, or one word for all."""
    policy = str(config["trainer.mp"])
    parts = dict(part.split("=", 1) for part in policy.split(",") if "=" in part)
    usual = "f32" if parts else policy  # of what a policy by parts does not say
    words = {
        "parameters": parts.get("p", parts.get("params", usual)),
        "compute": parts.get("c", parts.get("compute", usual)),
    }
    for word in words.values():
        if word not in _FORMATS:
            raise FileError(f"trainer.mp: {shown(policy)}: {shown(word)} is no format that is read")
    formats = {name: _FORMATS[word] for name, word in words.items()}
    return {**formats, "reduce": wire(formats["compute"])}


def _attention(config: Keys) -> str:
    backend = config["model.attn_backend"]
    flash = config["model.use_flash_attention"]
    key = backend.lower() if isinstance(backend, str) else backend
    if not is_one_of(key, _BACKENDS):
        raise FileError(f"model.attn_backend: {shown(backend)} is not read")
    return "unfused" if flash is False else _BACKENDS[key]


def _known(config: Keys, key: str, words: Mapping[str, str]) -> str:
    value = config[key]
    if not isinstance(value, str) or value not in words:
        raise FileError(f"{key}: {shown(value)} is not modelled{nearest(value, words)}")
    return words[value]


def _left(key: str, value: Any) -> NotCarried:
    """Return why a key is in no plan."""
    for pattern, reason in _LEFT:
        if re.fullmatch(pattern, key):
            return reason.of(key, value)
    return Reason("a section that is not read", BOTH).of(key, value)
