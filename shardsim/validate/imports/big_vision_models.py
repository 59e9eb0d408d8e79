"""The models of big_vision's configs: ViTs, pairs of towers, captioners, and PaliGemma.

Source: google-research/big_vision@0127fb6, big_vision/models/vit.py and models/proj/{image_text/
two_towers,image_text/text_transformer,cappa/cappa,paligemma/paligemma}.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardsim.carried import BOTH, Keys, NotCarried, is_one_of
from shardsim.emit.dialects import big_vision_tables as tables
from shardsim.errors import FileError, nearest, shown
from shardsim.model import load_model
from shardsim.validate.imports.literal_values import Arguments, Unknown

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
_SIZES = ("width", "depth", "mlp_dim", "num_heads")
# PaliGemma's language models (models/ppp/gemma.py) as models that ship.
_GEMMAS: Mapping[str, str] = {
    "gemma_2b": "gemma-2b",
    "gemma_7b": "gemma-7b",
    "gemma2_2b": "gemma2-2b",
    "gemma2_9b": "gemma2-9b",
    "gemma2_27b": "gemma2-27b",
}
# How a text's last of these becomes one embedding -> a plan's pooling.
_TEXT_POOLS: Mapping[str, str] = {
    "last": "last",
    "first": "cls",
    "mean": "mean",
    "gap": "mean",
    "map": "map",
}
_TOKENS = re.compile(r"\b(?:max_len|tolen\((?:length)?)\s*=?\s*(\d{1,6})")
Left = list[NotCarried]
Made = dict[str, Any]


def known(config: Keys, key: str, default: Any) -> Any:
    """Return a value; raise `FileError` where something decides it that the file does not say."""
    value = config.get(key, default)
    if isinstance(value, Arguments):
        value = Unknown("arg")
    if isinstance(value, Unknown):
        asked = value.by.startswith("arg.")
        why = f"decided by {value.by}" if value.by else "not a value that can be read"
        more = "; write its value into the file"
        if asked:
            more = f"; say it behind the file's name, as FILE.py:{value.by[4:]}=..."
        raise FileError(f"config.{key}: {why}{more}")
    return value


def count(config: Keys, key: str, default: Any = None) -> int:
    """Return a positive whole number."""
    value = known(config, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileError(f"config.{key}: expected a positive whole number, found {shown(value)}")
    return value


def tower_of(config: Keys) -> str:
    """Return the part of `config.model` that says the ViT."""
    return _MODELS[_kind(config)][1]


def model_of(config: Keys, image: int, name: str) -> tuple[Made, Left]:
    """Return the options of the model, and what of it no option says."""
    made, left = _MODELS[_kind(config)][0](config, image)
    return {"name": name, **made}, left


def _kind(config: Keys) -> str:
    kind = known(config, "model_name", "vit")
    if not is_one_of(kind, _MODELS):
        raise FileError(f"model_name: {shown(kind)} is not modelled{nearest(str(kind), _MODELS)}")
    if not any(key.startswith("model.") for key in config):
        known(config, "model", None)
        raise FileError("config.model: not a dict of values that can be read")
    return str(kind)


def _sizes(config: Keys, prefix: str, usual: Sequence[int | None]) -> tuple[Made, str]:
    """Return the sizes of a stack, and what stands behind its letter."""
    variant = known(config, f"{prefix}.variant", None)
    letter, _, cut = str(variant or "").partition("/")
    if variant is not None:  # without one its class has sizes of its own; of "" it makes none
        if letter not in VARIANTS:
            raise FileError(f"config.{prefix}.variant: {variant!r}{nearest(letter, VARIANTS)}")
        usual = VARIANTS[letter]
    width, depth, mlp, heads = (
        known(config, f"{prefix}.{name}", size) for name, size in zip(_SIZES, usual, strict=True)
    )
    sizes = {"layers": depth, "embed": width, "mlp": mlp or 4 * width, "heads": heads}
    return sizes, cut


def _vit(config: Keys, image: int, prefix: str = "model", classes: int = 0) -> tuple[Made, Left]:
    sizes, cut = _sizes(config, prefix, (768, 12, None, 12))
    usual = int(cut) if cut.isdigit() and len(cut) < 6 else 16
    patch = _patch(known(config, f"{prefix}.patch_size", (usual, usual)), image, prefix)
    pools = {theirs: ours for ours, theirs in tables.POOLINGS.items()}
    pool = known(config, f"{prefix}.pool_type", "gap")
    if not is_one_of(pool, pools):
        raise FileError(
            f"config.{prefix}.pool_type: {pool!r} is not modelled{nearest(str(pool), pools)}"
        )
    positions = {theirs: ours for ours, theirs in tables.POSITIONS.items()}
    posemb = known(config, f"{prefix}.posemb", "learn")
    if not is_one_of(posemb, positions):
        raise FileError(f"config.{prefix}.posemb: {posemb!r}{nearest(str(posemb), positions)}")
    left = []
    if image % patch:
        side = image // patch * patch
        why = f"{side // patch} patches of {patch} pixels a side: {side} pixels are read"
        left.append(NotCarried("image", image, why))
        image = side
    if pools[pool] == "cls":
        why = "a class token has a position of its own here: a row more than in big_vision"
        left.append(NotCarried(f"{prefix}.pool_type", pool, why))
    return {
        "family": "vit",
        **sizes,
        "patch": patch,
        "image": image,
        "pooling": pools[pool],
        "classes": classes if pool != "none" else 0,
        "positions": positions[posemb],
        "biases": True,
    }, left


def _patch(size: Any, image: int, prefix: str) -> int:
    if not isinstance(size, (tuple, list)) or len(set(map(str, size))) != 1:
        raise FileError(f"config.{prefix}.patch_size: {size!r}: only square patches are modelled")
    patch = size[0]
    if not isinstance(patch, int) or not 0 < patch <= image:
        raise FileError(f"config.{prefix}.patch_size: an image of {image} pixels has no {patch!r}")
    return patch


def _classifier(config: Keys, image: int) -> tuple[Made, Left]:
    classes = known(config, "num_classes", None) or 0
    return _vit(config, image, classes=classes)


def _tokens(config: Keys, more: int = 0) -> int:
    """Return the tokens of a text: of the shapes to begin with, else of the preprocessing."""
    shapes = known(config, "init_shapes", None)
    if isinstance(shapes, list | tuple) and len(shapes) > 1 and isinstance(shapes[1], list | tuple):
        last = shapes[1][-1]
        if isinstance(last, int) and last > 0:
            return last
    pp = known(config, "input.pp", known(config, "pp_train", ""))
    found = [int(number) for number in _TOKENS.findall(str(pp))]
    if not found:
        raise FileError("config.input.pp: says no length of a text, as tokenize(max_len=64)")
    return found[0] - more


def _frozen(config: Keys, tower: str) -> bool:
    """Return whether the schedule has no learning rate for a tower's weights."""
    rows = known(config, "schedule", None)
    for row in rows if isinstance(rows, list | tuple) else ():
        if isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str):
            if row[0] == f"{tower}/.*":
                return row[1] is None
            if row[0] == ".*":
                return row[1] is None
    return False


def _two_towers(config: Keys, image: int) -> tuple[Made, Left]:
    """Return towers of images and texts, whose embeddings are compared."""
    for key, usual in (("image", "vit"), ("text", "proj.image_text.text_transformer")):
        kind = known(config, f"model.{key}_model", usual)
        if kind != usual:
            raise FileError(f"config.model.{key}_model: {kind!r} is not modelled; {usual} is")
    made, left = _vit(config, image, "model.image")
    sizes, _ = _sizes(config, "model.text", (512, 12, 2048, 8))
    pool = known(config, "model.text.pool_type", "last")
    if not is_one_of(pool, _TEXT_POOLS):
        raise FileError(f"config.model.text.pool_type: {pool!r}{nearest(str(pool), _TEXT_POOLS)}")
    out = known(config, "model.out_dim", 128)
    both = out if isinstance(out, list | tuple) else (out, out)
    if len(both) != 2 or not all(one is None or type(one) is int for one in both):
        raise FileError(f"config.model.out_dim: {shown(out)}: expected one or two widths")
    text: Made = {
        "family": "encoder",
        **sizes,
        "vocab": count(config, "model.text.vocab_size", 32_000),
        "sequence": _tokens(config),
        "pooling": _TEXT_POOLS[pool],
        "biases": True,
        **({"features": both[1], "features_bias": True} if both[1] else {}),
        **({"frozen": True} if _frozen(config, "txt") else {}),
    }
    if _frozen(config, "img"):
        why = "the tower of images is taken to train: a plan freezes what another stack reads"
        left.append(NotCarried("schedule: img/.*", None, why, BOTH))
    sigmoid = known(config, "model.bias_init", None) is not None
    return {
        **made,
        "contrast": "sigmoid" if sigmoid else "softmax",
        **({"features": both[0], "features_bias": True} if both[0] else {}),
        "text": {"name": "text", **text},
    }, left


def _cappa(config: Keys, image: int) -> tuple[Made, Left]:
    """Return a captioner: a decoder whose layers attend to the tokens of a ViT."""
    usual = {"num_layers": 6, "num_heads": 8, "mlp_dim": 2048, "emb_dim": 512}
    inside = {key: count(config, f"model.{key}", value) for key, value in usual.items()}
    outer = {
        key: known(config, f"model.decoder_{key}", 0) or value for key, value in inside.items()
    }
    patch = _patch(known(config, "model.patches", (16, 16)), image, "model")
    positions = {theirs: ours for ours, theirs in tables.POSITIONS.items()}
    posemb = known(config, "model.posemb_type", "learn")
    if not is_one_of(posemb, positions):
        raise FileError(f"config.model.posemb_type: {posemb!r}{nearest(str(posemb), positions)}")
    bias = known(config, "model.decoder_bias", True) is True
    left = []
    masked = known(config, "model.masked_pred_prob", 0.0)
    known(config, "model.masking_ratio", 0.0)
    if masked:
        why = "predicting in parallel is the same step but for a mask; a row of masked words is out"
        left.append(NotCarried("model.masked_pred_prob", masked, why))
    if not bias:
        why = "the last norm's bias is out, as those of the layers are"
        left.append(NotCarried("model.decoder_bias", False, why))
    encoder = {
        "name": "images",
        "family": "vit",
        "layers": inside["num_layers"],
        "embed": inside["emb_dim"],
        "mlp": inside["mlp_dim"],
        "heads": inside["num_heads"],
        "patch": patch,
        "image": image - image % patch,
        "positions": positions[posemb],
        "biases": True,
    }
    return {
        "family": "decoder",
        "layers": outer["num_layers"],
        "embed": outer["emb_dim"],
        "mlp": outer["mlp_dim"],
        "heads": outer["num_heads"],
        "vocab": count(config, "model.vocab_size", 32_000),
        "sequence": count(config, "model.seq_len", 256),
        "causal": True,
        "head_bias": True,
        "positions": "learned" if posemb == "learn" else "fixed",
        "biases": {"mlp": bias, "norm": bias},
        "encoder": encoder,
    }, left


def _paligemma(config: Keys, image: int) -> tuple[Made, Left]:
    """Return a language model with images' tokens in front of its own."""
    images, left = _vit(config, image, "model.img")
    if images["pooling"] != "none":
        raise FileError("config.model.img.pool_type: only none is modelled, all tokens")
    name = known(config, "model.llm.variant", "gemma_2b")
    if not is_one_of(name, _GEMMAS):
        raise FileError(f"config.model.llm.variant: {shown(name)}{nearest(str(name), _GEMMAS)}")
    llm = load_model(_GEMMAS[name]).to_mapping()
    vocab = count(config, "model.llm.vocab_size", llm["vocab"])
    patches = (images["image"] // images["patch"]) ** 2
    frozen = {"frozen": True} if _frozen(config, "img") else {}
    if _frozen(config, "llm"):
        left.append(NotCarried("schedule: llm/.*", None, "the decoder is taken to train", BOTH))
    for key in ("note", "source"):
        llm.pop(key, None)
    return {
        **llm,
        "vocab": vocab,
        "sequence": patches + _tokens(config, more=1),
        "images": {"name": "images", **images, **frozen},
    }, left


# By `model_name`: what reads it, and the part of `config.model` with the ViT's switches.
_MODELS: Mapping[str, tuple[Callable[[Keys, int], tuple[Made, Left]], str]] = {
    "vit": (_classifier, "model"),
    "proj.image_text.two_towers": (_two_towers, "model.image"),
    "proj.cappa.cappa": (_cappa, "model"),
    "proj.paligemma.paligemma": (_paligemma, "model.img"),
}
