"""Every command in the README and the docs is run, and its output compared.

A block that starts with ```console holds commands (lines that start with `$ `) and what they print
to stdout. `python tests/test_docs.py` writes the blocks anew.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

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
    result = CliRunner().invoke(main, words[1:])
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


def test_the_plan_file_page_shows_a_plan_and_a_model_that_load() -> None:
    text = (ROOT / "docs" / "plan-files.md").read_text(encoding="utf-8")
    plan, model = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    loaded = plan_from_data(parse_yaml(plan, "page"), "page")
    assert (loaded.machine.chips, loaded.axis("model").size) == (1024, 8)
    assert load_model(parse_yaml(model, "page")).parallel_block


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
