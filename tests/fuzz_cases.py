"""Random cases for `fuzz.py`: command lines, and files and caches damaged in every way."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import click
import yaml

from shardsim.cli.main import main
from shardsim.files import data_folder, read_yaml
from shardsim.model.hf.defaults import DEFAULTS
from shardsim.validate.runs import PUBLISHED

HERE = Path(__file__).parent

JUNK_WORDS = (
    *("", " ", "x", "0", "1", "-1", "-", "--", "=", ",", ":", "*", "a=b", "nan", "inf", "-inf"),
    *("1e400", "1e-400", "1e308", "9" * 40, "0x10", "1_000", "1.5", "2", "3", "4", "8", "64k"),
    *("true", "false", "null", "none", "None", "full", "[]", "{}", "[1, 2]", "{a: b}", "!!int 3"),
    *("é" * 9, "\u202eabc", "\x1b[31m", "a\nb", "a\x00b", "\udcff", "a" * 3000, "%s", "../x"),
    *("~", "$HOME", "`id`", "v4", "v4:4x4x4", "v5e:2x2", "vit-b-16", "plan.yaml", "model.yaml"),
)  # fmt: skip
MODELS = (
    *("vit-b-16", "vit-b-16", "vit-s-16", "llama3-8b", "mixtral-8x7b", "deepseek-v2-lite"),
    *("gemma2-2b", "palm-8b", "dinov2-s-14", "model.yaml", "config.json", "ViT-L"),
)
SLICES = (
    *("v5e:2x2", "v5e:2x2", "v4:2x2x1", "v5e:1x1", "v6e:2x2", "v5p:2x2x1", "v3:2x2", "v5e-4"),
    *("2*v5e:2x2", "h100:8", "v4-8", "tpu7x:2x2x1", "v5e:2x2,v6e:2x2", "v4:2x2x2_twisted"),
)
MESHES = (
    *("fsdp=4", "data=4", "model=4", "fsdp=2,model=2", "data=2,fsdp=2", "context=4", "stage=4"),
    *("fsdp=8", "data=1", "expert=4", "fsdp=2,expert=2", "model=3", "tensor2=2,model=2", "fsdp=0"),
)
PLANS = (
    *("plan.yaml", "plan.yaml", "plan.yaml", "vit-22b-published-tp8", "other.yaml", "model.yaml"),
    *("maxtext-16b-published-v5e-1x256", "config.json", "vit-b-16", "llama3-8b", ".", "nosuch"),
)
KEYS = (
    *("batch", "sequence", "machine", "model", "mesh", "mesh.data", "mesh.model", "mesh.fsdp"),
    *("mesh.context", "mesh.stage", "mesh.model.size", "rules", "rules.parameters.embed", "remat"),
    *("rules.activations.seq", "rules.optimizer.embed", "remat.save", "remat.offload", "name"),
    *("microbatches", "overlap.matmul", "overlap.weights", "overlap.dcn", "precision.compute"),
    *("precision.parameters", "precision.state", "precision.gradients", "precision.reduce"),
    *("optimizer", "attention", "fused_projections", "pipeline_interleave", "vocab_tiles", "note"),
    *("offload_optimizer", "offload_parameters", "execution", "compiler_options", "op_costs"),
    *(
        "experts.exchange",
        "experts.imbalance",
        "context.keys",
        "context.order",
        "model.layers",
        "model.embed",
    ),
    *("model.heads", "model.experts", "model.experts.top_k", "model.latent", "model.windows"),
    *("model.biases.qkv", "model.image", "model.name", "model.vocab", "chip.link_bytes_per_s"),
    *("chip.hbm_bytes", "chip.hop_latency_s", "chip.peak_flops.bf16", "chip.peak_flops", "chip"),
    *("chip.clock_hz", "chip.matmul_efficiency", "chip.dcn_bytes_per_s", "chip.hbm_bytes_per_s"),
)
# What keys may well hold, so that cases get behind the first check.
GOOD: dict[str, tuple[Any, ...]] = {
    "batch": (64, 128, 4096, 65536, 96, 1),
    "sequence": (128, 512, 4096, 32768, 197, 1),
    "machine": ("v4:4x4x4", "v5e:4x4", "v5p:4x4x8", "2*v4:4x4x4", "v6e:8x8", "h100:8", "v2:4x4"),
    "model": ("vit-b-16", "llama3-8b", "mixtral-8x7b", "deepseek-v2-lite", "gemma2-2b", "palm-8b"),
    **dict.fromkeys(("mesh.data", "mesh.model", "mesh.fsdp", "mesh.context", "mesh.stage"),
                    (1, 2, 4, 8, 16, 64, 3)),
    "remat": ("full", "none", "dots", "save_qkv", "save_attention", {"offload": ["qkv"]},
              {"save": ["context"], "offload": ["layer_input", "mlp_hidden"]},
              [{"layers": 2, "save": []}, {"layers": 6, "save": ["qkv"]}]),
    "microbatches": (1, 2, 4, 8, 16, 3),
    "overlap.matmul": ("off", "unidirectional", "bidirectional"),
    **dict.fromkeys(("overlap.weights", "overlap.dcn", "overlap.gradients", "fused_projections",
                     "offload_optimizer", "model.biases.qkv"), (True, False)),
    **dict.fromkeys(("precision.compute", "precision.parameters", "precision.state",
                     "precision.gradients", "precision.reduce"), ("bf16", "f32", "int8", "fp8")),
    "optimizer": ("adamw", "adafactor", "sgd", "momentum", "adamw-bf16-mu", "adafactor-full"),
    "attention": ("flash", "unfused", "flash-2023"),
    "pipeline_interleave": (1, 2, 4),
    "vocab_tiles": (1, 2, 8, 3),
    "execution": ("explicit", "automatic"),
    "op_costs": ("physical", "compiler", "calibrated"),
    "experts.exchange": ("all-to-all", "ring"),
    "experts.imbalance": (1.0, 1.5, 8.0),
    "context.keys": ("gathered", "ring", "ulysses", "dsp"),
    "context.order": ("contiguous", "striped"),
    "model.layers": (1, 2, 4, 8, 48),
    "model.embed": (64, 256, 4096, 1000),
    "model.heads": (1, 8, 12, 64),
    "model.experts.top_k": (1, 2, 8),
    "model.windows": ([128], [128, 0], [0, 0, 64]),
    "model.vocab": (0, 1000, 32000, 128256),
    "model.image": (224, 384, 225),
    "chip.link_bytes_per_s": (45e9, 1.0, 1e15),
    "chip.hbm_bytes": (16e9, 1e12, 1.0),
    "chip.hop_latency_s": (0, 1e-6, 10.0),
    "chip.peak_flops.bf16": (1e12, 1e18, 1.0),
    "chip.hbm_bytes_per_s": (1e9, 1e15),
    "chip.dcn_bytes_per_s": (1e9, 1.0),
    "chip.matmul_efficiency": (0.5, 1.0, 1e-9),
    "rules.optimizer.embed": (["data"], [], ["data", "fsdp"]),
    "rules.parameters.embed": (["data"], ["fsdp"], ["fsdp", "data"], [], ["fsdp", "context"]),
    "rules.activations.seq": (["context"], ["model"], []),
}  # fmt: skip
VALUES = (
    *("1", "2", "4", "8", "3", "64", "1024", "64k", "0", "-1", "1e5", "0.5", "1e9", "1e-9", "true"),
    *("false", "full", "none", "dots", "off", "bidirectional", "bf16", "f32", "int8", "fp8"),
    *("unfused", "adamw", "adafactor", "sgd", "ring", "ulysses", "gathered", "striped", "emitted"),
    *("[data]", "[model, data]", "[]", "{save: [qkv]}", "{offload: [qkv, layer_input]}", "[128]"),
    *("90GB/s", "64GiB", "5us", "1GHz", "100Gbit/s", "physical", "compiler", "llama3-8b"),
    *("{size: 4, torus: {x: 4}}", "{number: 8, top_k: 2, mlp: 64}", "{a: 1}", "explicit"),
)  # fmt: skip
FORMS = ("jax", "json", "yaml", "maxtext", "flax", "flax-linen", "big_vision", "keras", "axlearn")
FORMS += ("levanter",)
BY_OPTION: dict[str, Sequence[str]] = {
    "--on": SLICES,
    "--batch": ("4", "64", "64k", "1e3", "3", "256", "4096"),
    "--seq": ("128", "256", "2048", "8k", "197"),
    "--top": ("1", "2", "3"),
    "--mesh": MESHES,
    "--why-not": MESHES,
    "--tokens": ("300B", "1e12", "1.5T"),
    "--images": ("1e9", "4e9"),
    "--chip-hour-price": ("4.2", "v5e=1.2", "v5e=1,v6e=2.7", "v5p=4.2,v5e=1.2"),
    "--optimizer": ("adamw", "adafactor", "sgd", "momentum"),
    "--attention": ("flash", "unfused", "flash-2023"),
    "--max-axes": ("1", "2"),
    "--output": ("out.yaml", "-", "no/x.yaml", ".", "", "/dev/full", "out.json", "o.png"),
    "--csv": ("out.csv", "-", "no/x.csv", "/dev/full"),
    "--measured-step": ("14.2", "850ms", "1us", "1e9"),
    "--measured-mfu": ("0.41", "41%", "99%", "1e-9"),
    "--counted": ("palm", "six_n", "megatron"),
    "--vary": ("batch=4,8", "mesh.data=1,2", "chip.link_bytes_per_s=45e9,90e9", "microbatches=1,2"),
    "--straggler": ("0,0,0=1.1", "3,0,5=1.1", "0,0=2"),
    "--dead-link": ("0,0,0-1,0,0", "0,0-1,0"),
    "--slow-link": ("0,0,0-1,0,0=0.5", "0,0-0,1=0.5"),
    "--dead-chip": ("0,0,0", "0,0"),
    "--jitter": ("0", "0.02", "2"),
    "--slow-dcn": ("0.5", "1", "0"),
    "--to": (*FORMS, "specs"),
    "--trainer-path": (".", "nosuch"),
    "--image": ("224", "384"),
    "--base": ("base.yml", "nosuch.yml"),
    "--runs": ("runs.yaml", "plan.yaml", "nosuch"),
    "--measured": ("runs.yaml", "nosuch", "plan.yaml"),
    "--workers": ("1",),
    "--timeout": ("1",),
}  # fmt: skip
# Commands that need another process, a compiler or pictures: not for a hundred thousand runs.
FAST = ("plan", "predict", "explain", "compare", "ablate", "sweep", "sensitivity", "export")
FAST += ("import", "validate", "hardware", "models", "cache")
LEFT_OUT = ("--scheduler", "--compile-top", "--compiled", "--fidelity", "--by-layer", "--workers")


@dataclass(frozen=True)
class Case:
    """One input: a command line in a folder with files, or a call that reads one of them."""

    words: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reads: str = ""  # "chip", "cache": what is called on the files instead


def junk(random: Random) -> str:
    """Return a word that hardly anything takes."""
    return random.choice(JUNK_WORDS)


def value(random: Random, of: Sequence[str], wrong: float = 0.15) -> str:
    """Return one of some words, or now and then junk."""
    return junk(random) if random.random() < wrong else random.choice(of)


def _assignment(random: Random) -> str:
    """Return KEY=VALUE, mostly of a value that the key may hold."""
    if random.random() < 0.25:
        return f"{value(random, KEYS, 0.1)}={value(random, VALUES, 0.1)}"
    key = random.choice(sorted(GOOD))
    return f"{key}={json.dumps(random.choice(GOOD[key]))}"


def _option(random: Random, item: click.Option) -> list[str]:
    name = item.opts[-1]
    if item.is_flag:
        return [name]
    if name in ("--set", "--fix"):
        return [name, _assignment(random)]
    if isinstance(item.type, click.Choice):
        return [name, value(random, tuple(map(str, item.type.choices)), 0.1)]
    return [name, value(random, BY_OPTION.get(name, VALUES))]


def command_line(random: Random) -> Case:
    """Return a command with some of its options."""
    name = random.choice(FAST)
    if name in ("explain", "validate", "ablate") and random.random() < 0.97:
        name = random.choice(("predict", "compare", "plan", "export"))  # those take seconds
    command = main.commands[name]
    words = [name] if random.random() < 0.98 else [junk(random)]
    options = [item for item in command.params if isinstance(item, click.Option)]
    options = [item for item in options if item.opts[-1] not in LEFT_OUT and item.name != "help"]
    for item in command.params:
        if isinstance(item, click.Argument):
            choices: Sequence[str] = MODELS if name in ("plan", "models") else PLANS
            if name == "plan" and random.random() < 0.9:
                choices = MODELS[:3]
            choices = {"hardware": (*SLICES, "v4", "v5e"), "cache": ("list", "size", "clear")}.get(
                name, choices
            )
            choices = (
                ("run.sh", "run.yml", "config.py", "config.json") if name == "import" else choices
            )
            number = 2 if item.nargs != 1 and random.random() < 0.8 else 1
            words += [value(random, choices, 0.05) for _ in range(number)]
    if name == "plan":
        words += ["--max-axes", "1", "--on", value(random, SLICES, 0.05), "--batch", "64"]
    elif name in ("predict", "explain") and random.random() < 0.4:
        words += ["--on", "v5e:2x2", "--batch", "64", "--mesh", value(random, MESHES, 0.05)]
    elif name == "import":
        words += [
            "--from",
            random.choice(("maxtext", "big_vision", "hf", "levanter")),
            "--on",
            "v5p:4x4x4",
        ]
    for _ in range(random.randint(0, 3)):
        words += _option(random, random.choice(options))
    if random.random() < 0.1:
        words.insert(random.randrange(len(words) + 1), junk(random))
    if random.random() < 0.05:
        del words[random.randrange(len(words))]
    return Case(
        tuple(words), {**_files(), **(_damaged_files(random) if random.random() < 0.2 else {})}
    )


@cache
def _texts() -> dict[str, str]:
    from small_plan import PLAN

    rows = read_yaml(PUBLISHED)["runs"]
    return {
        "plan.yaml": PLAN.replace("machine: v4:4x4x4", "machine: v4:4x4x4"),
        "other.yaml": (data_folder("plans") / "vit-22b-published-tp8.yaml").read_text("utf-8"),
        "model.yaml": "base: vit-b-16\nlayers: 4\n",
        "config.json": json.dumps({"model_type": "llama", "num_hidden_layers": 4}),
        "runs.yaml": yaml.safe_dump({"runs": rows[:1]}),
        "run.sh": MAXTEXT + "\n",
        "run.yml": "model_name: llama2-7b\nper_device_batch_size: 4\n",
        "config.py": BIG_VISION,
        "base.yml": "remat_policy: full\n",
    }


@cache
def _files() -> dict[str, bytes]:
    return {name: text.encode() for name, text in _texts().items()}


def _damaged_files(random: Random) -> dict[str, bytes]:
    name = random.choice(sorted(_texts()))
    return {name: damaged(random, _texts()[name].encode())}


def damaged(random: Random, data: bytes) -> bytes:
    """Return bytes with a few of them, or of their lines, otherwise."""
    for _ in range(random.randint(1, 3)):
        lines = data.split(b"\n")
        at = random.randrange(len(lines))
        how = random.randrange(9)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, lines[random.randrange(len(lines))])
        elif how == 2:
            lines[at] = lines[at].replace(b": ", random.choice((b":", b" : ", b"=", b": - ")), 1)
        elif how == 3:
            lines.insert(at, junk(random).encode("utf-8", "surrogateescape"))
        elif how == 4 and data:
            where = random.randrange(len(data))
            data = data[:where] + bytes([random.randrange(256)]) + data[where + 1 :]
            continue
        elif how == 5:
            data = data[: random.randrange(len(data) + 1)]
            continue
        elif how == 6:
            lines[at] = re.sub(
                rb"[0-9]+", junk(random).encode("utf-8", "replace")[:40], lines[at], count=1
            )
        elif how == 7:
            word = b"\\1 " + random.choice(VALUES).encode()
            lines[at] = re.sub(rb"([:=]) *[^ ,}]+", word, lines[at], count=1)
        else:
            lines[at] = b" " * random.randint(1, 4) + lines[at]
        data = b"\n".join(lines)
    return data


SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 4, 8, 16, 64, 256, -1, 10**9, 2**63, 10**40, 0.5, 1e308),
    *(float("nan"), float("inf"), [], {}, [1], {"a": 1}, ["data"], ["model", "data"], "full"),
    *("none", "data", "model", "x", "", "bf16", "a\nb", "é", "\x1b[31m", "v5e:2x2", "vit-b-16"),
)


def scalar(random: Random) -> Any:
    """Return a value of YAML that is rarely right."""
    return _one(random, SCALARS)


def _one(random: Random, values: Sequence[Any]) -> Any:
    """Return one of some values, a copy: what goes into a case may be changed there."""
    return deepcopy(random.choice(values))


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything inside nested mappings and lists."""
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    found: list[tuple[Any, ...]] = []
    for key, inner in entries:
        found.append((*path, key))
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


def _at(data: Any, path: Sequence[Any]) -> Any:
    for step in path:
        data = data[step]
    return data


def changed(random: Random, data: Any, known: Sequence[str] = ()) -> Any:
    """Return data with up to three entries replaced, removed or added; of `known` keys may be."""
    data = json.loads(json.dumps(data))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if known and random.random() < 0.4:
            _set(data, random.choice(known), random)
            continue
        if not (paths := places(data)):
            break
        leaves = [path for path in paths if not isinstance(_at(data, path), (dict, list))]
        *path, last = random.choice(leaves if leaves and random.random() < 0.8 else paths)
        inside = _at(data, path)
        how = random.randrange(12)
        good = GOOD.get(".".join(map(str, (*path, last)))) or _alike(inside[last])
        if how > 3 and good:
            inside[last] = _one(random, good)
        elif how > 1:
            inside[last] = scalar(random)
        elif how:
            del inside[last]
        elif isinstance(inside, dict):
            inside[random.choice((*KEYS, "zz"))] = scalar(random)
        else:
            inside.append(scalar(random))
    return data


def _set(data: Any, key: str, random: Random) -> None:
    """Give a key of a plan a value that it may hold."""
    *path, last = key.split(".")
    for step in path:
        inner = data.get(step) if isinstance(data, dict) else None
        if not isinstance(inner, dict):
            inner = {}
            if isinstance(data, dict):
                data[step] = inner
        data = inner
    if isinstance(data, dict):
        data[last] = _one(random, GOOD[key])


PLAN_KEYS = tuple(key for key in GOOD if not key.startswith(("model", "chip")))


def _alike(value: Any) -> tuple[Any, ...]:
    """Return other values of the kind of one."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (2 * value, value // 2, 4 * value, value + 1, 1)
    return (2.0 * value, 0.5 * value) if isinstance(value, float) else ()


def _yaml(random: Random, data: Any, known: Sequence[str] = ()) -> bytes:
    text = yaml.safe_dump(changed(random, data, known), allow_unicode=random.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _either(random: Random, name: str, text: str, known: Sequence[str] = ()) -> dict[str, bytes]:
    """Return a YAML file whose text or whose data is damaged."""
    if random.random() < 0.2:
        return {name: damaged(random, text.encode())}
    return {name: _yaml(random, yaml.safe_load(text), known)}


PLAN = """\
name: tiny
model: {base: vit-b-16, layers: 8, name: tiny}
machine: 2*v4:4x4x4
batch: 4096
mesh:
  data: {size: 2, torus: {dcn: 2}}
  fsdp: {size: 16, torus: {x: 4, z: 4}}
  model: {size: 4, torus: {y: 4}}
rules:
  parameters: {embed: [fsdp], heads: [model], mlp: [model]}
  activations: {batch: [data, fsdp], heads: [model], mlp: [model]}
  optimizer: {embed: [data]}
remat: {save: [qkv, mlp_hidden], offload: [context]}
microbatches: 2
overlap: {matmul: bidirectional, weights: true, gradients: true, dcn: false}
precision: {compute: bf16, parameters: f32, reduce: bf16}
optimizer: adamw
attention: flash
"""
EXPERTS = """\
model: {base: mixtral-8x7b, layers: 4, name: tiny}
machine: v5p:4x4x4
batch: 64
sequence: 4096
mesh: {fsdp: 4, context: 2, expert: 4, model: 2}
rules:
  parameters: {embed: [fsdp], heads: [model], mlp: [model], expert: [expert]}
  activations:
    {batch: [fsdp, expert], seq: [context], heads: [model], mlp: [model], expert: [expert]}
remat: full
experts: {exchange: all-to-all}
context: {keys: ring, order: striped}
"""
LATENT = """\
model: {base: deepseek-v2-lite, layers: 4, name: tiny}
machine: v5e:4x4
batch: 64
sequence: 4096
mesh: {fsdp: 8, expert: 2}
rules:
  parameters: {embed: [fsdp], expert: [expert]}
  activations: {batch: [fsdp, expert], expert: [expert]}
remat: dots
"""
PIPELINE = """\
model: {base: llama2-7b, layers: 8, name: tiny}
machine: v4:2x2x4
batch: 64
mesh: {stage: 4, fsdp: 4}
rules:
  parameters: {embed: [fsdp], layers: [stage]}
  activations: {batch: [fsdp]}
remat: full
microbatches: 8
pipeline_interleave: 2
vocab_tiles: 4
"""


def plan_file(random: Random) -> Case:
    """Return a command about a damaged plan."""
    files = _either(
        random, "plan.yaml", random.choice((PLAN, EXPERTS, LATENT, PIPELINE)), PLAN_KEYS
    )
    chance = random.random()
    if chance < 0.7:
        return Case(("predict", "plan.yaml", *(["--json"] if chance < 0.1 else [])), files)
    if chance < 0.8:
        return Case(("compare", "plan.yaml", "vit-22b-published-tp8"), files)
    if chance < 0.9:
        return Case(("export", "plan.yaml", "--to", value(random, BY_OPTION["--to"])), files)
    if chance < 0.95:
        return Case(("sensitivity", "plan.yaml"), files)
    if chance < 0.99:
        return Case(("predict", "plan.yaml", "--fidelity", "events"), files)
    return Case(("explain", "plan.yaml"), files)


def choices(random: Random) -> Case:
    """Return a sound plan with keys changed, or a search with choices held."""
    many = random.choice((1, 1, 2, 3))
    words = [word for _ in range(many) for word in ("--set", _assignment(random))]
    if random.random() < 0.75:
        name = random.choice(("plan.yaml", "vit-22b-published-tp8", "experts.yaml", "latent.yaml"))
        files = {"plan.yaml": PLAN, "experts.yaml": EXPERTS, "latent.yaml": LATENT}
        command = ("predict", name) if random.random() < 0.95 else ("sweep", name, "--vary")
        more = [f"{random.choice(KEYS)}={junk(random)},{random.choice(VALUES)}"] * (
            len(command) - 2
        )
        held = {one: text.encode() for one, text in files.items()}
        return Case((*command, *more, *words), held)
    words = [word.replace("--set", "--fix") for word in words]
    words = [word.replace("--set", "--fix") for word in words]
    on = random.choice(("v5e:2x2", "v5e:1x1", "v4:2x2x1"))
    model = random.choice(("vit-s-16", "vit-b-16", "llama3-8b"))
    return Case(("plan", model, "--on", on, "--batch", "64", "--max-axes", "1", *words))


MODEL = """\
name: mine
family: decoder
layers: 4
embed: 256
mlp: 1024
heads: 8
kv_heads: 2
head_dim: 32
sequence: 512
vocab: 1024
causal: true
gated_mlp: true
activation: silu
norm: rmsnorm
positions: rotary
biases: {qkv: true}
windows: [128, 0]
experts: {number: 8, top_k: 2, mlp: 512, shared: 1, dense_layers: 1}
"""


def model_file(random: Random) -> Case:
    """Return a command about a damaged model."""
    base = random.choice((MODEL, "base: vit-b-16\nlayers: 4\n", "base: deepseek-v2-lite\n"))
    files = _either(random, "model.yaml", base)
    if random.random() < 0.5:
        return Case(("models", "model.yaml"), files)
    words = ("--on", "v5e:2x2", "--batch", "64", "--mesh", random.choice(MESHES))
    return Case(("predict", "model.yaml", *words), files)


def config_json(random: Random) -> Case:
    """Return a Hugging Face config with other keys and values."""
    kind = random.choice(sorted(DEFAULTS))
    data: dict[str, Any] = {"model_type": kind, **DEFAULTS[kind]}
    if random.random() < 0.3:
        outer = random.choice(("gemma3", "llama4", "llava", "siglip", "clip", "mistral3"))
        part = "vision_config" if outer in ("siglip", "clip") else "text_config"
        data = {"model_type": outer, part: data}
    data = changed(random, {key: one for key, one in data.items() if _plain(one)})
    text = json.dumps(data).encode()
    text = damaged(random, text) if random.random() < 0.2 else text
    if random.random() < 0.7:
        return Case(("import", "config.json", "--from", "hf"), {"config.json": text})
    return Case(("models", "config.json"), {"config.json": text})


def _plain(one: Any) -> bool:
    try:
        json.dumps(one)
    except TypeError:
        return False
    return True


MAXTEXT = (
    "python3 -m maxtext.trainers.pre_train.train base.yml model_name=llama2-7b "
    "per_device_batch_size=4"
)
MAXTEXT_KEYS = tuple(
    word
    for line in (HERE / "maxtext_keys.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
)
MAXTEXT_VALUES = (
    *("true", "false", "0", "1", "2", "4", "8", "-1", "0.5", "int8", "fp8", "bfloat16", "float32"),
    *("full", "minimal", "custom", "device", "offload", "flash", "dot_product", "llama3-8b"),
    *("adamw", "sgd", "muon", "[1]", "[]", "''", "1e400", "nan", "v5p-128", "gemma2-9b", "full"),
    *("deepseek3-671b", "mixtral-8x7b", "local_sliding", "all_gather", "ring", "pure-fsdp", "x y"),
)  # fmt: skip


def maxtext(random: Random) -> Case:
    """Return a MaxText script or YAML with keys of its base.yml, or a damaged one."""
    pairs = [
        (value(random, MAXTEXT_KEYS, 0.03), value(random, MAXTEXT_VALUES, 0.08))
        for _ in range(random.choice((1, 1, 1, 2, 3, 6)))
    ]
    words = (
        "--from",
        "maxtext",
        "--on",
        value(random, ("v5p:4x4x4", "v5e:16x16", "v4:4x4x4"), 0.02),
    )
    if random.random() < 0.6:
        told = " ".join(f'{key}="{one}"' for key, one in pairs)
        text = f"#!/bin/bash\nexport M_STEPS=3\n{MAXTEXT} {told}\n"
        data = text.encode("utf-8", "surrogateescape")
        data = damaged(random, data) if random.random() < 0.15 else data
        return Case(("import", "run.sh", *words, "--json"), {"run.sh": data})
    said = {"model_name": "llama2-7b", "per_device_batch_size": 4}
    lines = [f"{key}: {one}" for key, one in {**said, **dict(pairs)}.items()]
    data = "\n".join(lines).encode("utf-8", "surrogateescape")
    data = damaged(random, data) if random.random() < 0.15 else data
    return Case(("import", "run.yml", *words), {"run.yml": data})


BIG_VISION = """\
import big_vision.configs.common as bvcc
import ml_collections as mlc

def get_config(arg=None):
  arg = bvcc.parse_arg(arg, variant='B/16', res=224, runlocal=False, batch=(1024, int))
  config = mlc.ConfigDict()
  config.input = {}
  config.input.batch_size = arg.batch if not arg.runlocal else 8
  config.input.data = dict(name='imagenet2012', split='train[:99%]')
  config.input.pp = f'decode|resize_small({arg.res + 64})|random_crop({arg.res})'
  config.num_classes = 1000
  config.model_name = 'vit'
  config.model = dict(variant='S/16', pool_type='gap', rep_size=True)
  config.model.variant = arg.variant
  config.optax = dict(mu_dtype='bfloat16')
  config.total_epochs = 2 * 45
  if arg.runlocal:
    config.input.data.split = 'train[:16]'
  elif arg.res > 300:
    config.grad_accum_steps = 4
  for name in ('a', 'b'):
    config[name] = [x for x in range(3)]
  return config
"""
PYTHON = (
    *("config.model.depth = 10 ** 9", "config.input.batch_size = 2 ** 70", "while True: pass"),
    *("config.x = 'a' * 10 ** 9", "config.x = 9 ** 9 ** 9", "import os; os.system('true')"),
    *("config.model = None", "return config", "config.mesh = [('data', -1)]", "exec('1')"),
    *("config.sharding_strategy = [('.*', 'fsdp(axis=\"data\")')]", "config.input.pp = ''"),
    *("config.model.variant = arg", "config = 3", "def get_config(): return get_config()"),
    *("config.x = [0] * 10 ** 9", "config.x = range(10 ** 12)", "config.num_classes = -1"),
    *("[f(x) for x in range(10 ** 9)]", "config.x = 1 << 10 ** 9", "config.input = 'x'"),
    *("config.x = f'{1:>1000000000}'", "config.x = '%1000000000d' % 1", "config.res = 1 / 0"),
)  # fmt: skip


def big_vision(random: Random) -> Case:
    """Return a big_vision config with other lines and arguments."""
    lines = BIG_VISION.splitlines()
    for _ in range(random.randint(0, 2)):
        lines.insert(random.randrange(5, len(lines)), "  " + random.choice(PYTHON))
    text = "\n".join(lines).encode()
    text = damaged(random, text) if random.random() < 0.4 else text
    arguments = random.choice(
        ("", "", ":variant=L/16", ":res=384,batch=8", ":runlocal", ":variant")
    )
    arguments = f":{junk(random)}" if random.random() < 0.1 else arguments
    words = ("--from", "big_vision", "--on", "v4:4x4x4")
    return Case(("import", f"config.py{arguments}", *words), {"config.py": text})


@cache
def _rows() -> list[Any]:
    return [json.loads(json.dumps(row, default=str)) for row in read_yaml(PUBLISHED)["runs"]]


def runs_file(random: Random) -> Case:
    """Return a damaged file of published runs."""
    data = {"runs": [random.choice(_rows())]}
    text = _yaml(random, data)
    text = damaged(random, text) if random.random() < 0.2 else text
    return Case(("validate", "--runs", "runs.yaml"), {"runs.yaml": text})


SETTINGS = "plan: {top: 3, op-costs: compiler}\npredict: {json: true, set: [batch=64]}\n"


def from_outside(random: Random) -> Case:
    """Return options from a damaged file of settings, and from the environment."""
    files = {**_files(), **_either(random, "settings.yaml", SETTINGS)}
    environment = {"SHARDSIM_SETTINGS": "settings.yaml"}
    if random.random() < 0.5:
        name = random.choice(
            ("PREDICT_SET", "PREDICT_MFU", "PREDICT_JSON", "PREDICT_BATCH", "CACHE")
        )
        told = junk(random).replace("\x00", "")
        environment[f"SHARDSIM_{name}"] = told.encode("utf-8", "replace").decode()
    return Case(
        random.choice((("predict", "plan.yaml"), ("models", "vit-b-16"))), files, environment
    )


RESULT = json.dumps({"memory": {"peak": 3}, "versions": {"jax": "0.12"}}).encode()


def kept(random: Random) -> Case:
    """Return a cache whose entries are damaged."""
    packed = gzip.compress(b"HloModule step\nENTRY main { }\n", mtime=0)
    files = {
        "tpu/a/result.json": RESULT,
        "tpu/a/hlo.txt.gz": packed,
        "tpu/ops/v4.jsonl": b'{"a": 1}\n',
    }
    for name in random.sample(sorted(files), random.randint(1, 2)):
        whole = (
            b"null",
            b"{}",
            b"[]",
            b"",
            b"\x00" * 9,
            b'{"error": 3}',
            b'{"memory": 3}',
            b"\xff",
        )
        files[name] = (
            random.choice(whole) if random.random() < 0.4 else damaged(random, files[name])
        )
    if random.random() < 0.2:
        del files[random.choice(sorted(files))]
    words = random.choice((("cache",), ("cache", "size"), ("cache", "--json"), ("cache", "clear")))
    return Case(words, files, {"SHARDSIM_CACHE": "."}, reads="cache")


@cache
def _chips() -> list[str]:
    return [path.read_text("utf-8") for path in sorted(data_folder("hardware").glob("*.yaml"))]


def chip_file(random: Random) -> Case:
    """Return a damaged hardware file."""
    text = random.choice(_chips())
    data = (
        damaged(random, text.encode())
        if random.random() < 0.5
        else _yaml(random, yaml.safe_load(text))
    )
    return Case(("chip.yaml",), {"chip.yaml": data}, reads="chip")


LEVANTER = """\
data: {tokenizer: meta-llama/Llama-2-7b-hf}
model: {type: llama, seq_len: 4096, hidden_dim: 4096, intermediate_dim: 11008, num_layers: 4,
  num_heads: 32, num_kv_heads: 32, gradient_checkpointing: true, flash_attention_block_size: 1024}
trainer: {mp: "p=f32,c=bfloat16", train_batch_size: 256, per_device_parallelism: 4,
  model_axis_size: 4, tensor_parallel_axes: [mlp, heads], fsdp_axis: embed}
optimizer: {learning_rate: 1.2e-5, weight_decay: 0.1}
"""


def levanter(random: Random) -> Case:
    """Return a damaged config of Levanter."""
    files = _either(random, "run.yaml", LEVANTER)
    return Case(("import", "run.yaml", "--from", "levanter", "--on", "v5p:4x4x4"), files)


@cache
def _program() -> bytes:
    return lzma.decompress((HERE / "xla/hlo/data/matmuls.hlo.xz").read_bytes())


def program(random: Random) -> Case:
    """Return a damaged compiled program."""
    data = _program()
    for _ in range(random.randint(0, 2)):
        data = damaged(random, data)
    data = gzip.compress(data, 1) if random.random() < 0.2 else data
    data = damaged(random, data) if random.random() < 0.2 else data
    words = ("--on", value(random, ("v5p", "v4:4x4x4", "v5p:4x4x4", "h100"), 0.05))
    words += ("--mesh", value(random, (*MESHES, "data=16,model=4"), 0.05))
    return Case(("inspect", "--hlo", "step.hlo", *words[: random.choice((0, 2, 4))]),
                {"step.hlo": data})  # fmt: skip


KINDS: dict[Callable[[Random], Case], int] = {
    command_line: 22,
    plan_file: 22,
    choices: 14,
    model_file: 8,
    maxtext: 12,
    config_json: 8,
    big_vision: 6,
    levanter: 4,
    program: 1,
    runs_file: 2,
    from_outside: 2,
    kept: 2,
    chip_file: 2,
}


def case_of(seed: int, number: int, only: str = "") -> Case:
    """Return a case: the same for the same seed and number."""
    random = Random(f"{seed}:{number}")
    kinds = [kind for kind in KINDS if not only or kind.__name__ == only]
    return random.choices(kinds, [KINDS[kind] for kind in kinds])[0](random)
