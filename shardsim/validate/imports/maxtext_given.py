"""What a MaxText file sets: its YAML, or the key=value words of a command in a script."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardsim.errors import FileError, shown
from shardsim.files import parse_yaml, read_yaml

COMMAND = re.compile(r"\bpython3?\b.*?(?:train(?:_compile)?(?:\.py)?|MaxText|maxtext)\b")
_WORD = re.compile(r"([^\W\d][\w.]*)=(.*)", re.DOTALL)
_FLAGS = re.compile(r"--(xla_[a-z0-9_]+)=([^\s\"']+)")
_NAME = re.compile(r"(?:export\s+|local\s+|readonly\s+|declare\s+(?:-\w+\s+)?)?([A-Za-z_]\w*)=")
_PLAIN = re.compile(r"\"([^\"`]*)\"|'([^']*)'|([^\s\"'`;]*)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}$]*))?\}|(\w+))")
_SHELL = re.compile(r"#!.*sh\b|(?:export\s+\w+=|set -\w+$|bash\s|sh\s|source\s|\. |echo\s)", re.M)
_OPENS = re.compile(r"(?:if|for|while|until|case|select)\b|(?:function\s+)?([\w-]+)\s*\(\)")
_TURNS = re.compile(r"(?:else|elif)\b|;;|[^()\s]+\)\s")
_CLOSES = re.compile(r"(?:fi|done|esac)\b|\}")
_PERHAPS = re.compile(r"(?:&&|\|\|)\s*(?:export\s+)?([A-Za-z_]\w*)=|\bread\s+(?:-\w+\s+)*(\w+)")
_OF_MAXTEXT = "M_"  # variables of the environment that MaxText reads as keys
_BASE = "base.yml"  # what every release has, and what its defaults stand for
_MOST_BASES = 4


@dataclass(frozen=True)
class Given:
    """Values by key, the compiler's flags beside them, and keys whose value is set elsewhere."""

    values: Mapping[str, Any]
    flags: Mapping[str, str]
    # Key -> what the script writes in place of a value.
    unset: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)  # what makes some of these open
    notes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of a base.yml beside the config

    @property
    def names(self) -> set[str]:
        """All keys, of a value or without one."""
        return {*self.values, *self.unset}


def read_given(path: Path, text: str, base: Path | None = None) -> Given:
    """Return what a config sets, with what the files that it names as its base do.

    `base` is the base.yml of a release; configs of its own are looked for beside it.
    """
    lines = re.sub(r"\\\r?\n", " ", text).splitlines()
    lines = [line for line in lines if not line.lstrip().startswith("#")]
    flags = dict(_FLAGS.findall("\n".join(lines)))
    commands = [number for number, line in enumerate(lines) if COMMAND.search(line)]
    folders = [path.parent, *([base.parent] if base is not None else [])]
    if path.suffix in (".yml", ".yaml") or not commands:
        if path.suffix in (".sh", ".bash") or _SHELL.match(text.lstrip()):
            raise FileError(f"{path}: no training command in this script")
        data = parse_yaml(text, str(path))
        if not isinstance(data, Mapping):
            raise FileError(f"{path}: expected MaxText's keys, or a command with key=value words")
        if not data:
            raise FileError(
                f"{path}: no keys; missing what says the model: model_name, or "
                "base_num_decoder_layers, base_emb_dim and the like"
            )
        own, usual = _with_bases({str(key): value for key, value in data.items()}, folders)
        return Given(own, flags, defaults=usual)
    variables, lost = _variables(lines[: commands[-1] + 1])
    given: dict[str, Any] = {}
    unset: dict[str, str] = {}
    why: dict[str, str] = {}
    of_maxtext = {
        key.removeprefix(_OF_MAXTEXT).lower(): value
        for key, value in variables.items()
        if key.startswith(_OF_MAXTEXT)
    }
    file, words = _words(lines[commands[-1]], path)
    for key, written in (*of_maxtext.items(), *words):
        value = _filled(written, variables)
        given.pop(key, None)
        unset.pop(key, None)
        if "$" in value or "`" in value:
            unset[key] = written
            why.update((key, lost[name]) for name in _names(value) if name in lost)
        else:
            given[key] = parse_yaml(value, f"{path}: {key}") if value else ""
    if not given:
        raise FileError(f"{path}: its command sets no key=value")
    notes = []
    defaults: dict[str, Any] = {}
    if len(commands) > 1:
        notes.append(f"the last of {len(commands)} training commands in the script is read")
    if file and Path(file).name != _BASE:
        below, defaults = _with_bases({"base_config": _filled(file, variables)}, folders)
        given = {**below, **given}
        del given["base_config"]
    return Given(_nested(given, path), flags, unset, why, tuple(notes), defaults)


def _with_bases(
    given: dict[str, Any], folders: list[Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return keys over those of the files that they name as their base, and base.yml's own.

    What base.yml says is a default: sizes there are no model's, and nothing of it was asked for.
    """
    below = given
    for _ in range(_MOST_BASES):
        name = str(below.get("base_config", ""))
        names = dict.fromkeys((name, Path(name).name))
        tried = (folder / one for folder in folders for one in names)
        found = next((file for file in tried if name and os.path.isfile(file)), None)
        if found is None:
            if name and Path(name).name != _BASE:
                raise FileError(
                    f"base_config: {shown(name)} is not beside the config; bring it there"
                )
            return given, {}
        data = read_yaml(found)
        below = {str(key): value for key, value in data.items()} if _keyed(data) else {}
        if Path(name).name == _BASE:
            return given, below
        given = {**below, **given}
    return given, {}


def _keyed(data: Any) -> bool:
    return isinstance(data, Mapping)


def _nested(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return words of groups, as lora.lora_rank=16, in their groups."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        group, dot, name = key.partition(".")
        if not dot:
            found[key] = {**found[key], **value} if _both(found.get(key), value) else value
            continue
        inside = found.setdefault(group, {})
        if not isinstance(inside, dict):
            raise FileError(f"{path}: {key}: {group} has a value of its own")
        inside[name] = value
    return found


def _both(one: Any, other: Any) -> bool:
    return isinstance(one, dict) and isinstance(other, dict)


def _variables(lines: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the shell's variables that stand at a script's last line, and those it may change.

    A variable that is set in a branch or a loop that is over is one of these: which way the
    script goes is not known. So is one whose value is made by a command.
    """
    found: dict[str, str] = {}
    lost: dict[str, str] = {}
    inside: list[tuple[str, set[str]]] = []  # open blocks: of which function, and what each sets
    functions: dict[str, set[str]] = {}

    def lose(names: set[str], why: str) -> None:
        for name in names:
            lost[name] = f"${name}, which {why}"
            found.pop(name, None)

    for line in (part.strip() for one in lines for part in _statements(one)):
        if _CLOSES.match(line) and inside:
            function, names = inside.pop()
            lose(names, "a branch or a loop of the script sets")
            functions |= {function: names} if function else {}
        elif inside and (arm := _TURNS.match(line)):
            lose(inside[-1][1], "another branch of the script sets")
            line = line[arm.end() :].strip()
        if opened := _OPENS.match(line):
            inside.append((opened[1] or "", set()))
        lose(functions.get(line.partition(" ")[0], set()), "a function of the script sets")
        for perhaps in _PERHAPS.finditer(line):
            lose({perhaps[1] or perhaps[2]}, "the script sets in some cases")
        line = re.sub(r"^(?:then|do|else|\{)\s+", "", line)
        while match := _NAME.match(line):
            name, value = match[1], _PLAIN.match(line, match.end())
            assert value is not None  # it may be empty
            text = value[0].strip("\"'")
            text = text if value[0].startswith("'") else _filled(text, found)
            for _, names in inside:
                names.add(name)
            if "$" in text or "`" in line[match.end() : match.end() + 1]:
                lose({name}, "the script takes from elsewhere")
            else:
                found[name] = text
                lost.pop(name, None)
            line = re.sub(r"^[;\s]+", "", line[value.end() :])
    return found, lost


def _statements(line: str) -> list[str]:
    """Return a line's statements; one with quotes or a command stays whole."""
    if re.search(r"[\"'`]|\$\(|;;", line) or not re.search(
        r";\s*(?:then|do|fi|done)\b|;\s*\w+=", line
    ):
        return [line]
    return line.split(";")


def _names(text: str) -> list[str]:
    return [match[1] or match[3] for match in _VARIABLE.finditer(text)]


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """Return text with variables that are known, or that have a default, in place.

    >>> _filled("${A:-8}", {}), _filled("$A", {"A": "2"}), _filled("$B", {})
    ('8', '2', '$B')
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    return _VARIABLE.sub(value, text)


def _words(command: str, path: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the file that a command reads, and key and text of its words.

    A command in quotes is one of another's words.
    """
    match = COMMAND.search(command)
    before = command[: match.start()] if match else ""
    if before.count('"') % 2 == before.count("'") % 2 == 0:  # none is open
        command = re.split(r";|&&|\|\|", before)[-1] + command[len(before) :]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise FileError(f"{path}: the command is not whole: {error}") from None
    file = ""
    found: list[tuple[str, str]] = []
    for word in words:
        if COMMAND.search(word) and len(word) < len(command):
            inner, more = _words(word, path)
            file, found = inner or file, found + more
        elif match := _WORD.fullmatch(word):
            own = match[1].startswith(_OF_MAXTEXT) and match[1].isupper()  # M_STEPS=5 python3 ...
            key = match[1].removeprefix(_OF_MAXTEXT).lower() if own else match[1]
            found.append((key, match[2]))
        elif word.endswith((".yml", ".yaml")) and not file:
            file = word
    return file, found


def is_script(path: Path, text: str) -> bool:
    """Say whether a file is read as a script with a training command, not as YAML."""
    return path.suffix not in (".yml", ".yaml") and COMMAND.search(_bare(text)) is not None


def _bare(text: str) -> str:
    """Return a script, as long as it was, without comments and with each command in one line."""
    for left_out in (r"\\\r?\n", r"(?m)^[ \t]*#.*"):
        text = re.sub(left_out, lambda found: " " * len(found[0]), text)
    return text


def last_command(text: str) -> tuple[int, int, int]:
    """Return where the last training command of a script begins, its first word, and its end."""
    plain = _bare(text)
    start = [match.start() for match in COMMAND.finditer(plain)][-1]
    end = plain.find("\n", start)
    end = len(text) if end < 0 else end
    word = re.compile(r"(?<=[\s\"'])[^\W\d][\w.]*=").search(plain, start, end)
    return start, word.start() if word else end, end
