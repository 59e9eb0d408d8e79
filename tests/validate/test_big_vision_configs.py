"""big_vision's configs are read without running them, by the branches that arguments take."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsim.emit import export_plan
from shardsim.errors import ShardsimError
from shardsim.model import load_model
from shardsim.plan import load_plan
from shardsim.validate.imports import Imported, import_config
from shardsim.validate.imports.literal_values import Unknown
from shardsim.validate.imports.literals import read_python

CONFIG = """
import big_vision.configs.common as bvcc
import ml_collections as mlc

def _set_task(config, size, classes=10, *, suffix='|keep("image")'):
  pp = f'decode|resize_small({size + 64})|random_crop({size})'
  pp += suffix
  config.input.pp = pp
  config.num_classes = classes

def get_config(arg=None):
  arg = bvcc.parse_arg(arg, variant='B/16', res=224, runlocal=False, batch=(1024, int))
  config = mlc.ConfigDict()
  config.input = {}
  config.input.batch_size = arg.batch if not arg.runlocal else 8
  config.input.data = dict(name='imagenet2012', split='train[:99%]')
  _set_task(config, arg.res, classes=1000)
  config.model_name = 'vit'
  config.model = dict(variant='S/16', pool_type='gap')
  config.model.variant = arg.variant
  config.optax = dict(mu_dtype='bfloat16')
  config.total_epochs = 2 * 45
  config.evals = {**dict(type='classification'), 'log_steps': 10 ** 3}
  if arg.runlocal:
    config.input.data.split = 'train[:16]'
  elif arg.res > 300:
    config.grad_accum_steps = 4
  return config
"""


def read(folder: Path, text: str, arguments: str = "", **more: Any) -> Imported:
    """Return the import of a config's text."""
    file = folder / "config.py"
    file.write_text(text, encoding="utf-8")
    name = f"{file}:{arguments}" if arguments else str(file)
    return import_config(name, "big_vision", machine="v4:4x4x4", **more)


def test_arguments_decide_what_branches_and_functions_make(tmp_path: Path) -> None:
    plan = read(tmp_path, CONFIG).plan
    assert (plan.batch, plan.model.image, plan.model.embed) == (1024, 224, 768)
    assert (plan.model.classes, plan.microbatches, plan.optimizer) == (1000, 1, "adamw-bf16-mu")
    plan = read(tmp_path, CONFIG, "variant=L/16,res=384,batch=2048").plan
    assert (plan.batch, plan.model.image, plan.model.embed) == (2048, 384, 1024)
    assert plan.microbatches == 4
    assert (plan.precision.compute, plan.precision.reduce) == ("f32", "f32")  # nothing is cast
    with pytest.raises(ShardsimError, match="8"):  # does not divide by 64 devices
        read(tmp_path, CONFIG, "runlocal")
    with pytest.raises(ShardsimError, match="argument 'size': the config does not read it"):
        read(tmp_path, CONFIG, "size=384")


def test_every_key_is_in_the_plan_or_listed(tmp_path: Path) -> None:
    more = "\n  config.model.rep_size = True\n  config.model.own = 3\n  config.more = 1\n  return"
    text = CONFIG.replace("\n  return config", f"{more} config")
    left = {item.key: item.could_change for item in read(tmp_path, text).not_carried}
    assert left == {
        "input.pp": (),
        "input.data.name": (),
        "input.data.split": (),
        "total_epochs": (),
        "evals.type": (),
        "evals.log_steps": (),
        "model.rep_size": ("time", "hbm"),
        "model.own": ("time", "hbm"),
        "more": ("time", "hbm"),
    }


def test_the_last_of_several_values_counts_and_a_local_run_does_not(tmp_path: Path) -> None:
    text = """
def get_config(arg=None):
  config = ml_collections.ConfigDict()
  config.input = {}
  config.input.batch_size = 1024
  config.input.pp = 'decode|resize(224)|value_range(-1, 1)'
  config.model = dict(variant='B/16', pool_type='gap')
  config.model.variant = 'L/16'
  if arg.runlocal:
    config.input.batch_size = 64
  return config
"""
    plan = read(tmp_path, text).plan
    assert (plan.batch, plan.model.layers, plan.model.embed) == (1024, 24, 1024)
    assert read(tmp_path, text, "runlocal=True").plan.batch == 64


DECIDED = {
    "input.batch_size": "config.input.batch_size = arg.size",
    "model.depth": "config.model.depth = 2 * arg.size",
    "model.scan": "if arg.size:\n    config.model.scan = True",
    "mesh": "if not arg.size == 3:\n    pass\n  else:\n    config.mesh = [('data', 64)]",
    "model.pool_type": "config.model.update(pool_type='map' if arg.size else 'gap')",
}


@pytest.mark.parametrize("key", DECIDED)
def test_what_an_argument_decides_is_asked_for(key: str, tmp_path: Path) -> None:
    text = CONFIG.replace("\n  return config", f"\n  {DECIDED[key]}\n  return config")
    with pytest.raises(ShardsimError, match=rf"config\.{key}: decided by arg\.size; say it"):
        read(tmp_path, text)
    assert read(tmp_path, text, "size=64").plan.batch in (64, 1024)


def test_an_image_of_no_whole_patches_is_cut(tmp_path: Path) -> None:
    found = read(tmp_path, CONFIG, "variant=So400m/14,res=384")
    assert (found.plan.sequence, found.plan.model.patches) == (729, 729)
    assert "image" in {item.key for item in found.not_carried}


HOSTILE = [
    "config = config.a.b.c",
    "config.a = config\nconfig.b = config\nconfig.a.c = config",
    "x = [1]\n" + "x = [x, x, x, x]\n" * 40 + "config.x = x",
    "x = 'a' * 10\n" + "x = x + x\n" * 60 + "config.x = x",
    "x = 9\n" + "x = x * x\n" * 60 + "config.x = x ** x",
    "config.x = '{:>999999999999}'.format(1)",
    "config.x = '{0.__class__.__mro__}'.format(1)",
    "config.x = (0) ** -1 + (-8) ** 0.5",
    "def f(): return f() + f()\nconfig.x = f()",
    "def f(c):\n  f(c)\n  f(c)\nf(config)",
    "while True: config.x = 1",
    "raise ValueError('no')",
    "def get_config(arg): return [1]",
    "def get_config(arg):\n  for i in [1]:\n    config.model = dict(variant='B/16')",
    "config.model = {'variant': {'a': 1}}\nconfig.input.batch_size = True",
    "config.x = " + "(" * 500 + "1" + ")" * 500,
    "import os\nos.remove('/nothing')\nconfig.x = open('/etc/passwd').read()",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ShardsimError) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


_NAMES = st.sampled_from(["a", "b", "config", "arg", "config.model", "config.input"])
_EXPRESSIONS = st.recursive(
    st.one_of(
        _NAMES, st.integers(0, 99).map(str), st.sampled_from(["'x'", "None", "True", "arg.b"])
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/%"), inner).map(" ".join),
        st.tuples(inner, inner).map(lambda two: f"[{two[0]}, {two[1]}]"),
        inner.map(lambda one: f"dict(a={one})"),
        inner.map(lambda one: f"f({one})"),
        st.tuples(inner, inner, inner).map(lambda three: "({} if {} else {})".format(*three)),
    ),
    max_leaves=8,
)
_STATEMENTS = st.one_of(
    st.tuples(_NAMES, _EXPRESSIONS).map(lambda two: f"{two[0]} = {two[1]}"),
    st.tuples(_NAMES, _EXPRESSIONS).map(lambda two: f"{two[0]}.b = {two[1]}"),
    st.tuples(_EXPRESSIONS, _NAMES).map(lambda two: f"if {two[0]}:\n    {two[1]} = 1"),
)


@settings(max_examples=120, deadline=None)
@given(body=st.lists(_STATEMENTS, max_size=8), arguments=st.sampled_from(["", "b=3", "b"]))
def test_any_program_is_read_or_refused(body: list[str], arguments: str) -> None:
    lines = "".join(f"  {line}\n" for line in body)
    text = f"def f(x):\n  return x\ndef get_config(arg):\n  config = {{}}\n{lines}  return config\n"
    with contextlib.suppress(ShardsimError, RecursionError):
        config, *_ = read_python(text, arguments)
        assert isinstance(config, dict)


def test_loops_over_what_the_file_says_are_gone_through() -> None:
    text = """
NAMES = ('a', 'b')
def of(config, name):
  config[name] = name * 1 if False else f'{name}{len(NAMES)}'
def get_config():
  config = {}
  for name in NAMES:
    of(config, name)
  for number in range(3):
    config.last = number
  for name, value in dict(c=1).items():
    config[name] = value
  for one in unknown():
    config.lost = one
  return config
"""
    made, *_ = read_python(text, "")
    assert made == {"a": "a2", "b": "b2", "last": 2, "c": 1, "lost": Unknown("a loop")}


def test_what_depends_on_an_unknown_is_unknown_by_it() -> None:
    text = "config.x = [arg.a + 1, 2]\nconfig.y = f'{config.x[0]}'\nconfig.z = config.x[1]"
    body = text.replace("\n", "\n  ")
    made, *_ = read_python(f"def get_config(arg):\n  config = {{}}\n  {body}\n  return config", "")
    assert made["y"] == Unknown("arg.a")
    assert made["z"] == 2


TOWERS = """
import ml_collections as mlc

def get_config(arg=None):
  arg = bvcc.parse_arg(arg, res=224, img='B/16', txt='B', frozen='')
  c = mlc.ConfigDict()
  c.input = {}
  c.input.batch_size = 1024
  tok = lambda key: f'tokenize(max_len=64, inkey="{key}")'
  c.input.pp = '|'.join(['decode', f'resize({arg.res})', *[tok(k) for k in ('text',)], 'keep'])
  c.model_name = 'proj.image_text.two_towers'
  c.model = mlc.ConfigDict()
  c.model.image = dict(variant=arg.img, pool_type='map', scan=True)
  c.model.text = mlc.ConfigDict(dict(variant=arg.txt, vocab_size=32_000))
  c.model.out_dim = (None, {'B': 768, 'L': 1024}[arg.txt])
  c.model.bias_init = -10.0
  c.schedule = [(f'{arg.frozen}/.*', None), ('.*', dict(decay_type='cosine'))]
  return c
"""
CAPTIONS = """
def get_config(arg=None):
  config = bvcc.parse_arg(arg, runlocal=False, total_steps=1000, batch_size=2048)
  config.input = {}
  config.input.batch_size = config.batch_size if not config.runlocal else 8
  def tokenizer(key):
    return f'tokenize(max_len={64}, inkey="{key}")'
  config.input.pp = f'decode|resize(224)|{tokenizer("text")}'
  config.model_name = 'proj.cappa.cappa'
  config.model = ml_collections.ConfigDict()
  config.model.num_layers = 12
  config.model.num_heads = 12
  config.model.mlp_dim = 3072
  config.model.emb_dim = 768
  config.model.seq_len = 64
  config.model.decoder_num_layers = 6
  config.model.decoder_bias = False
  config.model.masked_pred_prob = 0.75
  return config
"""
GEMMA = """
from big_vision.configs.proj.own.common import combine, LENGTH
import big_vision.configs.proj.own.common as own

def get_config(arg=None):
  c = bvcc.parse_arg(arg, res=224, size='', freeze_vit=False)
  c.input = bvcc.parse_arg('')
  c.input.batch_size = 256
  c.input.pp = '|'.join([f'decode|resize({c.res})', combine(LENGTH), own.kept(a=1)])
  c.schedule = [('img/.*', None if c.freeze_vit else {}), ('llm/.*', {})]
  c.model_name = 'proj.paligemma.paligemma'
  c.model = {}
  c.model.img = dict(variant='So400m/14', pool_type='none', scan=True)
  c.model.llm = dict(vocab_size=256_000 + 1024 + 128, dropout=0.0)
  if c.size:
    c.model.llm.variant = 'gemma2_' + {'3b': '2b'}[c.size]
  return c
"""
COMMON = """
LENGTH = 128
def kept(**kw):
  return 'keep(' + ', '.join(f'{key}={value}' for key, value in kw.items()) + ')'
def combine(length, before=()):
  return '|'.join([*before, f'tolen({length+1}, key="text")', kept(b=2)])
"""


def test_pairs_of_towers_are_read_with_their_trainers_loss(tmp_path: Path) -> None:
    found = read(tmp_path, TOWERS)
    model, siglip = found.plan.model, load_model("siglip-b")
    assert model.parameters_all == siglip.parameters_all  # 203,155,968 and two scalars
    assert (model.contrast, found.plan.remat.name) == ("sigmoid", "full")
    assert [part.model.frozen for part in model.parts] == [False, False]
    frozen = read(tmp_path, TOWERS, "frozen=txt").plan.model
    assert [part.model.frozen for part in frozen.parts] == [True, False]
    left = read(tmp_path, TOWERS, "frozen=img").not_carried
    assert "schedule: img/.*" in {item.key for item in left if item.could_change}
    softmax = read(tmp_path, TOWERS.replace("c.model.bias_init", "c.model.other")).plan.model
    assert softmax.contrast == "softmax"


def test_captioners_are_read_from_their_own_arguments(tmp_path: Path) -> None:
    found = read(tmp_path, CAPTIONS)
    plan, cappa = found.plan, load_model("cappa-b-16")
    assert (plan.batch, plan.sequence) == (2048, 64)
    assert [part.model.layers for part in plan.model.parts] == [12, 6]
    assert plan.model.parameters_all == cappa.parameters_all
    assert {item.key for item in found.not_carried if item.could_change} == set()
    assert read(tmp_path, CAPTIONS, "batch_size=4096").plan.batch == 4096


def test_functions_of_the_tree_that_a_config_is_in_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "big_vision" / "configs" / "proj" / "own"
    folder.mkdir(parents=True)
    (folder / "common.py").write_text(COMMON)
    plan = read(folder, GEMMA).plan
    paligemma = load_model("paligemma-3b")
    assert plan.model.parameters_all == paligemma.parameters_all == 2_923_335_408
    assert plan.sequence == 256 + 128
    frozen = read(folder, GEMMA, "freeze_vit=True").plan.model
    assert [part.model.frozen for part in frozen.parts] == [True, False]
    assert read(folder, GEMMA, "size=3b").plan.model.layers == 26
    with pytest.raises(ShardsimError, match="says no length of a text"):
        read(folder, GEMMA.replace("combine(LENGTH)", "'flatten'"))
    with pytest.raises(ShardsimError, match="no preprocessing says how large"):
        read(tmp_path, GEMMA)  # without the tree


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TOWERS.replace("image_text.two_towers", "clippo.one_tower"), "model_name"),
        (TOWERS + "  c.model.text_model = 'x'\n", "one"),
        (TOWERS.replace("'map'", "'tok2'"), "pool_type: 'tok2' is not modelled"),
        (TOWERS.replace("vocab_size=32_000", "vocab_size='x'"), "vocab_size: expected"),
        (CAPTIONS.replace("= 12\n", "= 0\n"), "num_layers: expected a positive whole number"),
        (CAPTIONS.replace("3072", "arg.width"), "mlp_dim: decided by arg.width; say it"),
        (CAPTIONS.replace("3072", "arg"), "mlp_dim: decided by arg; write its value into"),
    ],
)
def test_models_that_cannot_be_said_have_the_reason(text: str, words: str, tmp_path: Path) -> None:
    if words == "one":
        text, words = text.replace("  return c\n", "") + "  return c\n", "text_model: 'x'"
    with pytest.raises(ShardsimError, match=words):
        read(tmp_path, text)


def test_a_variant_of_nothing_is_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(ShardsimError, match=r"config.model.variant: ''; choose from: B, G"):
        read(tmp_path, CONFIG, "variant=")


def test_an_export_is_read_alone_and_where_a_config_calls_it(tmp_path: Path) -> None:
    plan = load_plan("vit-e-data-parallel")
    (tmp_path / "planned.py").write_text(export_plan(plan, "big_vision"), encoding="utf-8")
    alone = import_config(str(tmp_path / "planned.py"), "big_vision", machine="v4:4x8x8")
    end = "  import planned\n  planned.apply(config)\n  return config\n"
    whole = CONFIG.replace("  return config\n", end)
    (tmp_path / "config.py").write_text(whole, encoding="utf-8")
    called = import_config(str(tmp_path / "config.py"), "big_vision", machine="v4:4x8x8")
    for found in (alone.plan, called.plan):
        assert (found.batch, found.mesh, found.optimizer_rules) == (
            plan.batch,
            plan.mesh,
            {"embed": ("data",)},
        )
        assert found.model.parameters_all == plan.model.parameters_all
    assert not [item for item in called.not_carried if item.key.startswith("planned")]


def test_what_a_function_elsewhere_changes_is_listed(tmp_path: Path) -> None:
    whole = CONFIG.replace("  return config\n", "  planned.apply(config)\n  return config\n")
    listed = {item.key: item.could_change for item in read(tmp_path, whole).not_carried}
    assert listed["planned.apply(config)"] == ("time", "hbm")


def test_moments_over_a_part_of_the_data_axes_are_listed(tmp_path: Path) -> None:
    more = """  config.mesh = [('replica', 4), ('data', 16)]
  config.sharding_rules = [('act_batch', ('replica', 'data'))]
  config.sharding_strategy = [('opt/.*', 'shard_dim("data", -1)'), ('.*', 'replicate')]
  return config
"""
    found = read(tmp_path, CONFIG.replace("  return config\n", more))
    assert found.plan.optimizer_rules == {}
    assert [item.key for item in found.not_carried if "opt/" in item.key]
