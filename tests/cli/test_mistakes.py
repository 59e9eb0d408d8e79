"""Bad input: one clear line on stderr, exit status 2, nothing on stdout, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from said import Shardsim, refused
from small_plan import PLAN

from shardsim.errors import ModelError
from shardsim.files import data_folder
from shardsim.model import load_model, load_model_file, model_names
from shardsim.views.write import printable

ON = ("--on", "v4:4x4x4", "--batch", "1024")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "vit-22", *ON], "unknown model 'vit-22'; did you mean 'vit-22b'?"),
        (
            ["plan", "vit-22b", "--on", "v4:8x8x17", "--batch", "64"],
            "there is no slice v4:8x8x17; from 4x4x4 up every axis is a multiple of 4; "
            "nearest: v4:4x4x68, v4:8x12x12 or v4:4x12x24",
        ),
        (
            ["plan", "vit-22b", "--on", "v4", "--batch", "64"],
            "'v4' is a chip, not a slice of it; for example v4:8x8x8, v4:8x8x16, v4:8x16x16 or "
            "v4:16x16x16",
        ),
        (
            ["plan", "vit-22b", *ON, "--optimizer", "adamww"],
            "optimizer: 'adamww' is not possible; did you mean 'adamw'?",
        ),
        (
            ["plan", "vit-22b", *ON, "--attention", "flas"],
            "attention: 'flas' is not possible; did you mean 'flash'?",
        ),
        (
            ["plan", "vit-22b", "--on", "v4:4x4x4", "--batch", "-3"],
            "--batch: must be a whole number from 1 to 1,000,000,000, not -3",
        ),
        (
            ["plan", "vit-22b", "--on", "v4:4x4x4", "--batch", "9" * 30],
            "--batch: must be a whole number from 1 to 1,000,000,000, not 1.00e+30",
        ),
        (
            ["predict", "vit-22b", *ON, "--mesh", "fsdp=64", "--seq", "0"],
            "--seq: must be a whole number from 1 to 1,000,000,000, not 0",
        ),
        (
            ["explain", "vit-22b", *ON, "--mesh", "fsdp=64", "--batch", "-4"],
            "--batch: must be a whole number from 1 to 1,000,000,000, not -4",
        ),
        (
            ["plan", "vit-22b", *ON, "--top", "0"],
            "--top: must be a whole number from 1 to 1,000,000,000, not 0",
        ),
        (
            ["plan", "vit-22b", "--on", "v4:4x4x4", "--batch", "1.5"],
            "invalid value for '--batch': '1.5' is not a whole number, such as 65536 or 64k "
            "(see shardsim plan --help)",
        ),
        (["plan", "vit-22b"], "missing option '--on' (see shardsim plan --help)"),
        (["hardware", "v9"], "unknown chip 'v9'; choose from: a100, h100, h100-500w, h200, h800, "
                             "rpi4, tpu7x, v100, v2, v3, v4, v5e, v5p, v6e"),
        (["models", "nosuch.yaml"], "nosuch.yaml: No such file or directory"),
        (["predict", ""], "a plan's name is empty; give a file, or the name of a shipped plan"),
        (["import", "", "--from", "maxtext"], 
         "a config's name is empty; give MaxText's YAML, or a script that starts a training"),
        (["import", "", "--from", "big_vision"], 
         "a config's name is empty; give Python with get_config()"),
        (["import", "", "--from", "hf"], 
         "a config's name is empty; give a config.json, or a folder with one"),
        (["predict", "vit-22b-published-tp9"], "vit-22b-published-tp9: no such file, nor a plan of "
                                               "that name; did you mean 'vit-22b-published-tp8'?"),
        (["validate", "--runs", "/nosuch"], "/nosuch: No such file or directory; 'experts' "
                                        "are those of shardsim's"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    shardsim: Shardsim, words: list[str], message: str
) -> None:
    assert refused(shardsim(*words)) == message


@pytest.mark.parametrize(
    "words",
    [
        ["plann"],
        ["--bogus"],
        ["plan", "vit-22b", *ON, "--objectve", "mfu"],
        ["plan", "vit-22b", *ON, "--objective", "mf"],
        ["plan", "vit-22b", *ON, "--max-axes", "9"],
        ["predict", "x", "--fidelity", "exact"],
        ["predict", "x", "--set"],
        ["sweep", "x"],
        ["validate", "--run", "x"],
    ],
)
def test_mistakes_in_the_command_line_point_to_the_help(
    shardsim: Shardsim, words: list[str]
) -> None:
    assert "--help)" in refused(shardsim(*words))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("microbatchs=4", "microbatchs: unknown key; did you mean 'microbatches'?"),
        ("microbatches", "'microbatches': expected key=value, such as microbatches=4"),
        ("microbatches=a", "small: microbatches: must be a positive whole number, not 'a'"),
        ("microbatches=null", "small: microbatches: must be a positive whole number, not null"),
        ("microbatches=.inf", "small: microbatches: must be a positive whole number, not inf"),
        ("microbatches=true", "small: microbatches: must be a positive whole number, not true"),
        (
            "batch=100000000000000000",
            "small: batch: must be at most 1,000,000,000, not 1.00e+17",
        ),
        (
            "batch=24",
            "small: batch: sequences over data, fsdp and microbatches: 24 does not divide by 16; "
            "the nearest that do: 16 and 32",
        ),
        ("overlap=off", "small: overlap: expected a mapping of keys, found bool; write "
                        "{matmul: off}"),
        ("overlap.weight=off", "small: overlap: unknown key 'weight'; did you mean 'weights'?"),
        ("rules=[]", "small: rules: expected a mapping of keys, found list, such as {parameters: "
                     "{embed: [fsdp]}}"),
        ("mesh.modl=2", "mesh.modl: no such mesh axis; did you mean 'model'?"),
        ("mesh.model.torus=[[x]]", "small: mesh.model.torus: v4:4x4x4 has no axis '['x']'; "
                                   "choose from: dcn, x, y, z"),
        ("model.layer=4", "model 'vit-l-16': unknown key 'layer'; did you mean 'layers'?"),
        ("chip=v5p", "chip: name what of it to change, as in chip.link_bytes_per_s"),
        ("chip.link_bytes_per_s=1e-300",
         "chip.link_bytes_per_s: 1e-300 is more than 1e+06 times away from 4.5e+10"),
        ("chip.hop_latency_s=1e308", "chip.hop_latency_s: 1e+308 s is longer than 1 s"),
        ("optimizer=adam", "small: optimizer: 'adam' is not possible; did you mean 'adamw'?"),
        ("batch=*a", "batch: line 1: YAML aliases (*name) are not accepted"),
        ("batch=!!python/object:os.system {}",
         "batch: line 1: YAML tags (!word) are not accepted"),
        ("ba\x1b[31mtch=3", "ba\\x1b[31mtch: unknown key; did you mean 'batch'?"),
    ],
)  # fmt: skip
def test_changes_that_cannot_be(
    shardsim: Shardsim, plan_file: Path, change: str, message: str
) -> None:
    assert refused(shardsim("predict", str(plan_file), "--set", change)) == message


def test_bytes_that_are_no_text(shardsim: Shardsim, plan_file: Path) -> None:
    assert "\\udcff" in refused(shardsim("predict", "\udcff"))
    refused(shardsim("predict", str(plan_file), "--set", "batch=\udcff"))
    refused(shardsim("predict", "a" * 5000))
    refused(shardsim("models", "/" + "a" * 5000))


def test_a_long_message_is_cut_in_its_middle(shardsim: Shardsim, plan_file: Path) -> None:
    assert len(refused(shardsim("predict", "a" * 100_000))) < 1000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch: 1024\n", "", "plan: missing key 'batch'"),
        ("batch: 1024", "batch: [1024]", "batch: must be a positive whole number, not [1024]; "
         "write 1024"),
        ("batch: 1024", "batch: .nan", "batch: must be a positive whole number, not nan"),
        ("batch: 1024", "batch: 0x" + "f" * 5000, "line 4: a whole number beyond 2^63"),
        ("batch: 1024", "batch: 1" + "0" * 5000, "line 4: a whole number beyond 2^63"),
        ("batch: 1024", "batch: 2020-13-45",
         "batch: must be a positive whole number, not '2020-13-45'"),
        ("batch: 1024", "batch: 1024\nbatch: 2048", "line 5: key 'batch' appears twice"),
        ("batch: 1024", "batch: !!python/object:os.system {}",
         "line 4: YAML tags (!word) are not accepted"),
        ("batch: 1024", "batch: &a [*a]", "line 4: YAML aliases (*name) are not accepted"),
        ("batch: 1024", "batch: " + "[" * 100, "line 4: nested deeper than 64 levels"),
        ("batch: 1024", "bathc: 1024", "plan: unknown key 'bathc'; did you mean 'batch'?"),
        ("machine: v4:4x4x4", "machine: v5e:16x16",
         "mesh.data.torus: v5e:16x16 has no axis 'z'; choose from: dcn, x, y"),
        ("machine: v4:4x4x4", "machine: v4:4x4x8",
         "mesh: its axes take 4 of 'z', which is 8 long on v4:4x4x8; the factors on a torus axis "
         "must multiply to its length"),
        ("model: vit-l", "model: 7", "model: expected a mapping of keys, found int"),
        ("data: {size: 16", "'da-ta': {size: 16",
         "mesh: an axis is called by letters, digits and _, such as data, not 'da-ta'"),
        ("remat: full", "remat: fll", "remat: unknown remat policy 'fll'; did you mean 'full'?"),
        ("remat: full", "remat: [qkv, context]",
         "remat: a list is of groups of layers; write {save: [qkv, context]}"),
        ("remat: full", "remat: save qkv + context, offload mlp_hidden",
         "remat: unknown remat policy 'save qkv + context, offload mlp_hidden'; write "
         "{save: [qkv, context], offload: [mlp_hidden]}"),
        ("remat: full", "context: ulysses",
         "context: expected a mapping of keys, found str; write {keys: ulysses}"),
        ("remat: full", "optimizer: {type: adamw}",
         "optimizer: expected text, found {'type': 'adamw'}; write adamw"),
        ("remat: full", "offload_optimizer: 'yes'",
         "offload_optimizer: must be true or false; write true"),
        ("remat: full", "remat:", "remat: is empty; name a policy, such as full or none"),
        ("remat: full", "remat: [{layers: 16, save: []}, {layers: 4, save: [qkv]}]",
         "remat: its groups have 20 layers, the model has 24"),
        ("remat: full", "fused_projections: true",
         "fused_projections: only a parallel block can fuse QKV with the MLP's input; vit-l-16 has "
         "serial layers, so leave it out or set it to false"),
        (PLAN, "", "plan: expected a mapping of keys, found nothing"),
        (PLAN, "- 1\n", "plan: expected a mapping of keys, found list"),
        (PLAN, "a: 1\n---\nb: 2\n", "line 2: not valid YAML: but found another document"),
    ],
)  # fmt: skip
def test_plan_files_that_are_none(
    shardsim: Shardsim, plan_file: Path, old: str, new: str, message: str
) -> None:
    assert old in PLAN
    plan_file.write_text(PLAN.replace(old, new), encoding="utf-8")
    assert refused(shardsim("predict", str(plan_file))) == f"{plan_file}: {message}"


def test_what_is_no_text_file(shardsim: Shardsim, tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    assert refused(shardsim("predict", str(binary))) == f"{binary}: not a text file (UTF-8)"
    assert refused(shardsim("models", str(binary))) == f"{binary}: not a text file (UTF-8)"
    assert refused(shardsim("predict", str(tmp_path))) == f"{tmp_path}: Is a directory"
    assert refused(shardsim("validate", "--runs", str(binary)))


def test_an_empty_text_names_no_file(shardsim: Shardsim, plan_file: Path) -> None:
    for command in ("verify", "calibrate"):
        line = refused(shardsim(command, str(plan_file), "--profile", ""))
        assert "'--profile': an empty text names no file" in line


def test_numbers_of_many_digits_are_told_in_few(shardsim: Shardsim, plan_file: Path) -> None:
    line = refused(shardsim("predict", str(plan_file), "--set", "batch=1e99"))
    assert line.endswith("batch: must be at most 1,000,000,000, not 1.00e+99")


def test_names_from_files_reach_the_terminal_spelt_out(
    shardsim: Shardsim, plan_file: Path, tmp_path: Path
) -> None:
    name = '"\\e[31m\\nred\\u202e"'
    plan_file.write_text(PLAN.replace("small", name), encoding="utf-8")
    line = refused(shardsim("predict", str(plan_file), "--set", "batch=3"))
    assert line.startswith("\\x1b[31m red\\u202e: batch: ")
    runs = tmp_path / "runs.yaml"
    runs.write_text(
        f"runs:\n- {{id: {name}, model: vit-l, chip: v4, chips: 64, global_batch: 1024}}\n"
        f"- {{id: {name}, model: vit-l, chip: v4, chips: 64}}\n",
        encoding="utf-8",
    )
    result = shardsim("validate", "--runs", str(runs))
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\\x1b[31m\\nred\\u202e" in result.stdout
    assert "runs[1] ('\\x1b[31m\\nred\\u202e'): global_batch: missing" in result.stderr


@pytest.mark.parametrize("letter", ["\x00", "\x1b", "\n", "\r", "\x7f", "\x9b", "\u202e", "\udcff"])
def test_printable(letter: str) -> None:
    assert printable(f"a{letter}b").isprintable()
    assert printable("ViT-L é 8x8") == "ViT-L é 8x8"


def test_output_that_cannot_be_written_is_found_before_the_work(
    shardsim: Shardsim, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the work was done first")

    monkeypatch.setattr("shardsim.planner.search.search", never)
    monkeypatch.setattr("shardsim.planner.whatif.sweep", never)
    gone = tmp_path / "gone" / "out"
    message = f"cannot write {gone}: there is no folder {gone.parent}"
    assert refused(shardsim("plan", "vit-l", *ON, "-o", str(gone))) == message
    vary = ("--vary", "batch=1024")
    assert refused(shardsim("sweep", str(plan_file), *vary, "--csv", str(gone))) == message
    assert "directory" in refused(shardsim("plan", "vit-l", *ON, "-o", str(tmp_path)))


def test_nothing_is_written_when_the_input_is_bad(
    shardsim: Shardsim, plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(shardsim("plan", "vit-x", *ON, "-o", str(out)))
    refused(shardsim("plan", "vit-l", *ON, "--optimizer", "x", "-o", str(out)))
    refused(shardsim("sweep", str(plan_file), "--vary", "batch=3,5", "--csv", str(out)))
    refused(shardsim("sweep", str(plan_file), "--vary", "btch=3,5", "--csv", str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["x"], "'x': expected key=a,b,c, such as microbatches=1,2,4"),
        (["batch=,,"], "'batch=,,': expected key=a,b,c, such as microbatches=1,2,4"),
        (["batch=1024", "batch=512"], "batch: varied twice; give all its values at once"),
        (
            ["overlap.wieghts=true,false"],
            "no combination makes a plan: overlap: unknown key 'wieghts'; did you mean 'weights'?",
        ),
        (
            [f"batch={','.join(map(str, range(1, 400)))}", f"note={','.join('x' * 400)}"],
            "159,600 combinations are too many; at most 100,000",
        ),
    ],
)
def test_sweeps_that_make_no_table(
    shardsim: Shardsim, plan_file: Path, vary: list[str], message: str
) -> None:
    words = [word for text in vary for word in ("--vary", text)]
    assert refused(shardsim("sweep", str(plan_file), *words)) == message


# What a file may be, and what is said of it where a plan or a model is wanted.
OTHERS = {
    "model.yaml": "base: vit-l\nlayers: 12\n",
    "chip.yaml": (data_folder("hardware") / "v4.yaml").read_text(encoding="utf-8"),
    "runs.yaml": "runs:\n- {id: a, model: vit-l}\n",
    "plan.yaml": PLAN,
    "search.json": '{"plans": [], "searched": 3}',
    "predicted.json": '{"step_time_s": 3, "mfu": 0.5}',
    "explained.json": '{"changes": [], "prediction": {"step_time_s": 3, "mfu": 0.5}}',
    "config.yml": "model_name: llama2-7b\nper_device_batch_size: 4\n",
    "hf.yaml": '{"model_type": "llama"}',
}
WANTED = {
    "predict": {
        "model.yaml": "it is a model, not a plan; it also needs --on, --batch and --mesh",
        "chip.yaml": "it is a chip, not a plan; shipped ones lie in hardware/",
        "runs.yaml": "it is a runs file, not a plan; shardsim validate --runs takes it",
        "search.json": "it is JSON of a search, not ",
        "predicted.json": "it is JSON of a prediction, not ",
        "explained.json": "it is JSON of explain, not ",
        "config.yml": "it is a trainer's config, not a plan; see shardsim import",
        "hf.yaml": "it is a Hugging Face config, not a plan; called .json, it is taken where a ",
    },
    "models": {
        "chip.yaml": "model: it is a chip, not a model",
        "plan.yaml": "model: it is a plan, not a model; predict, explain and compare take it whole",
        "hf.yaml": "model: it is a Hugging Face config, not a model; called .json, ",
    },
}


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in WANTED.items() for name in names]
)
def test_a_file_of_another_kind_is_called_what_it_is(
    shardsim: Shardsim, tmp_path: Path, command: str, name: str
) -> None:
    file = tmp_path / name
    file.write_text(OTHERS[name], encoding="utf-8")
    said = refused(shardsim(command, str(file)))
    assert said.startswith(f"{file}: {WANTED[command][name]}")
    if command == "predict":
        assert refused(shardsim("explain", str(file))) == said
        assert refused(shardsim("compare", str(file), str(file))).startswith(f"{file}: ")


def test_models_that_are_files(shardsim: Shardsim, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: vit-l\nlayers: 12\n", encoding="utf-8")
    assert load_model(file) == load_model(str(file)) == load_model_file(file)
    other = tmp_path / "mine"  # no ending
    other.write_text("vit-l\n", encoding="utf-8")
    assert load_model(str(other)) == load_model("vit-l")
    file.write_text(f"{other}\n", encoding="utf-8")  # files name presets, not files
    with pytest.raises(ModelError, match="unknown model"):
        load_model(file)
    file.write_text(f"base: {file}\n", encoding="utf-8")
    with pytest.raises(ModelError, match="unknown model"):
        load_model(file)
    with pytest.raises(ModelError, match=r"a folder without a Hugging Face config\.json"):
        load_model(str(tmp_path))
    told = f"{tmp_path}: a folder without a Hugging Face config.json"
    assert refused(shardsim("import", "--from", "hf", str(tmp_path))) == told
    assert refused(shardsim("models", "zzzz")) == (
        f"unknown model 'zzzz'; shardsim models shows all {len(model_names())}"
    )


def test_only_the_extra_that_is_missing_is_named(
    shardsim: Shardsim, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsim.cli.simulation.find_spec", lambda name: None)
    played = shardsim("predict", str(plan_file), "--fidelity", "events")
    assert refused(played).endswith("pip install 'shardsim[simulate]'")
    drawn = shardsim("timeline", str(plan_file), "-o", str(plan_file.with_name("layer.png")))
    assert refused(drawn).endswith("pip install 'shardsim[simulate,report]'")
