"""What a MaxText file sets: its YAML, or the key=value words of a command in a script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsim.errors import FileError
from shardsim.files import parse_yaml, read_yaml

_COMMAND = re.compile(r"\bpython3?\b.*?(?:train(?:_compile)?(?:\.py)?|MaxText|maxtext)\b")
_WORD = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)
_FLAGS = re.compile(r"--(xla_[a-z0-9_]+)=([^\s\"']+)")
_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"$`]*\"|'[^']*'|[^\s\"'$`;]*);?")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}$]*))?\}|(\w+))")
_SHELL = re.compile(r"#!.*sh\b|(?:export\s+\w+=|set -\w+$|bash\s|sh\s|source\s|\. |echo\s)", re.M)
_OF_MAXTEXT = "M_"  # variables of the environment that MaxText reads as keys


@dataclass(frozen=True)
class Given:
    """Values by key, the compiler's flags beside them, and keys whose value is set elsewhere."""

    values: Mapping[str, Any]
    flags: Mapping[str, str]
    unset: Mapping[str, str]  # key -> what the script writes in place of a value

    @property
    def names(self) -> set[str]:
        """All keys, of a value or without one."""
        return {*self.values, *self.unset}


def read_given(path: Path, text: str) -> Given:
    """Return what a config sets, with what the file that it names as its base does."""
    lines = re.sub(r"\\\r?\n", " ", text).splitlines()
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    flags = dict(_FLAGS.findall("\n".join(lines)))
    commands = [line for line in lines if _COMMAND.search(line)]
    if path.suffix in (".yml", ".yaml") or not commands:
        if path.suffix in (".sh", ".bash") or _SHELL.match(text.lstrip()):
            raise FileError(f"{path}: no training command in this script")
        data = parse_yaml(text, str(path))
        if not isinstance(data, Mapping):
            raise FileError(f"{path}: expected MaxText's keys, or a command with key=value words")
        given = {str(key): value for key, value in data.items()}
        base = path.parent / str(given.get("base_config", ""))
        if os.path.isfile(base) and base != path:
            inherited = read_yaml(base)
            given = {**(inherited if isinstance(inherited, Mapping) else {}), **given}
        return Given(given, flags, {})
    variables = _variables(lines)
    given = {}
    unset: dict[str, str] = {}
    of_maxtext = {
        key.removeprefix(_OF_MAXTEXT).lower(): value
        for key, value in variables.items()
        if key.startswith(_OF_MAXTEXT)
    }
    for key, written in (*of_maxtext.items(), *_words(commands[-1], path)):
        value = _filled(written, variables)
        given.pop(key, None)
        unset.pop(key, None)
        if "$" in value or "`" in value:
            unset[key] = written
        else:
            given[key] = parse_yaml(value, f"{path}: {key}") if value else ""
    if not given:
        raise FileError(f"{path}: its command sets no key=value")
    return Given(given, flags, unset)


def _variables(lines: list[str]) -> dict[str, str]:
    """Return the shell's variables that a script sets to plain text, the last value of each."""
    found = {}
    for line in lines:
        if match := _ASSIGNED.fullmatch(line.strip()):
            found[match[1]] = match[2].strip("\"'")
    return found


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """Return text with variables that are known, or that have a default, in place.

    >>> _filled("${A:-8}", {}), _filled("$A", {"A": "2"}), _filled("$B", {})
    ('8', '2', '$B')
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    return _VARIABLE.sub(value, text)


def _words(command: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield key and text of a command's words; a command in quotes is one of another's words."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise FileError(f"{path}: the command is not whole: {error}") from None
    for word in words:
        if _COMMAND.search(word) and len(word) < len(command):
            yield from _words(word, path)
        elif match := _WORD.fullmatch(word):
            yield match[1], match[2]
