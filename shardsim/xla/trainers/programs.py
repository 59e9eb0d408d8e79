"""MaxText programs that were compiled for slices without a TPU: what was asked, what came out.

`programs.yaml` says what is compiled, `programs.json` what the compiler made of it
(`python -m shardsim.xla.trainers.collect`). Reading them needs neither JAX nor MaxText.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from shardsim.errors import FileError
from shardsim.files import read_yaml
from shardsim.machine import Machine, parse_machine
from shardsim.plan import Plan
from shardsim.validate.imports.maxtext import read_maxtext

_HERE = Path(str(resources.files("shardsim.xla.trainers")))
ASKED = _HERE / "programs.yaml"
COMPILED = _HERE / "programs.json"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A MaxText step: a name, a slice, MaxText's own options, the compiler's flags."""

    id: str
    slice: str
    options: tuple[str, ...]
    flags: tuple[str, ...] = ()  # "xla_...=true"
    apart: bool = False  # of those that no rule was made from

    @property
    def machine(self) -> Machine:
        """The slice."""
        return parse_machine(self.slice)

    @cached_property
    def plan(self) -> Plan:
        """The plan that `shardsim import` makes of its command."""
        words = " ".join(f"'{option}'" for option in self.options)
        flags = " ".join(f"--{flag}" for flag in self.flags)
        command = f"# {flags}\npython3 -m maxtext.trainers.pre_train.train base.yml {words}\n"
        return read_maxtext(Path(f"{self.id}.sh"), command, self.slice)[0]


def programs(path: Path = ASKED) -> tuple[Program, ...]:
    """Return the programs that a file asks for, in its order."""
    data = read_yaml(path)
    try:
        sets = data["flags"]
        found = tuple(
            Program(
                id=row["id"],
                slice=row["machine"],
                options=tuple(row["options"].split()),
                flags=tuple(sets[row["flags"]]) if "flags" in row else (),
                apart=row.get("apart", False),
            )
            for row in data["programs"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: expected flags and programs ({error})") from None
    if len({one.id for one in found}) < len(found):
        raise FileError(f"{path}: two programs have one id")
    return found


def compiled(path: Path = COMPILED) -> dict[str, dict[str, Any]]:
    """Return what the compiler made of programs, by id."""
    if not path.exists():
        return {}
    rows: Iterable[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["programs"]
    return {row["id"]: row for row in rows}


def both(asked: Sequence[Program] | None = None) -> list[tuple[Program, dict[str, Any]]]:
    """Return the programs that were compiled, each with what came out."""
    found = compiled()
    return [(one, found[one.id]) for one in asked or programs() if one.id in found]
