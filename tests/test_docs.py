"""Every command in the README and the docs is run, and its output compared.

A block that starts with ```console holds commands (lines that start with `$ `) and what they print
to stdout. `python tests/test_docs.py` writes the blocks anew. Commands elsewhere (blocks of a
shell, examples of `--help`), which take minutes, chips or a browser, are read but not run: their
options are those of the command.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from said import shardsim as invoked

import shardsim
from shardsim.cli.main import main
from shardsim.files import parse_yaml
from shardsim.model import Accounting, load_model
from shardsim.plan import plan_from_data
from shardsim.validate.rows import KEYS, MEASURED
from shardsim.validate.runs import runs_from_data

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def run(command: str) -> str:
    """Return what one documented command prints to stdout."""
    words = shlex.split(command)
    assert words[0] == "shardsim"
    result = invoked(*words[1:])
    assert result.exit_code in (0, 1), f"{command}: {result.output}"
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def written_anew(block: str) -> str:
    """Return a console block with its commands run again."""
    commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"$ {command}\n{run(command)}\n" for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.jax if page.stem == "running" else ()) for page in PAGES],
    ids=[page.name for page in PAGES],
)
def test_documented_commands_print_what_is_written(page: Path) -> None:
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert written_anew(block) == block


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in main.commands:
        assert f"shardsim {name}" in text


def parsed(line: str) -> Iterator[str]:
    """Yield the commands of shardsim in a line of a shell, each read with its own options."""
    for part in re.split(r"&&|\||;", line.split(" # ")[0]):
        words = shlex.split(part)
        if words[:1] != ["shardsim"] or words[1:2] in ([], ["--help"]):
            continue
        main.commands[words[1]].make_context(words[1], words[2:])
        yield part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_blocks_of_a_shell_are_read(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            assert all(parsed(line))


@pytest.mark.parametrize("name", sorted(main.commands))
def test_examples_of_the_help_are_read(name: str) -> None:
    lines = [line for line in (main.commands[name].help or "").splitlines() if "shardsim " in line]
    commands = [found for line in lines if line.startswith("  ") for found in parsed(line.strip())]
    assert commands
    assert all(len(f"    {line.strip()}") <= 80 for line in lines)  # as click shows them


def test_the_list_of_commands_says_whole_sentences() -> None:
    assert "..." not in run("shardsim --help").partition("Commands:")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_are_those_of_the_commands(page: Path) -> None:
    for command, rest in re.findall(r"`shardsim (\w+)([^`]*)`", page.read_text(encoding="utf-8")):
        known = {text for item in main.commands[command].params for text in item.opts}
        assert {text for text in re.findall(r"--[a-z][a-z-]*", rest)} <= {*known, "--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_name_what_there_is(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ss":
                assert node.attr in shardsim.__all__


def test_pictures_have_words_for_who_does_not_see_them() -> None:
    for page in PAGES:
        for words, path in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text("utf-8"), re.DOTALL):
            assert len(words.split()) >= 5, f"{page.name}: {path}"
            assert (page.parent / path).is_file()


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    words = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.stem == "README" or f": {page.name}" in listed
        name = "index" if page.stem == "README" else page.stem
        html = (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', html)
    assert "cost-model" in (tmp_path / "site/search/search_index.json").read_text(encoding="utf-8")


def test_the_plan_file_page_shows_a_plan_and_models_that_load() -> None:
    text = (ROOT / "docs" / "plan-files.md").read_text(encoding="utf-8")
    plan, *models = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    loaded = plan_from_data(parse_yaml(plan, "page"), "page")
    assert (loaded.machine.chips, loaded.axis("model").size) == (1024, 8)
    first, *_ = [load_model(parse_yaml(model, "page")) for model in models]
    assert first.parallel_block


def test_the_page_on_runs_files_shows_a_row_that_loads_and_names_every_key() -> None:
    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    ((run,), failed) = runs_from_data(parse_yaml(shown, "page"), "page")
    assert failed == []
    assert [plan.machine.chips for plan in run.plans] == [1024] * 5
    for key in (*KEYS, *MEASURED, *(each.value for each in Accounting)):
        assert f"`{key}`" in text


def rewrite() -> None:
    """Write the output of every documented command into its page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda match: f"```console\n{written_anew(match.group(1))}```", text)
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
