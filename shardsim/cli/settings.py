"""Settings from a file: what options are where the command line does not say, by command.

    plan: {top: 5, op-costs: compiler}
    explain: {as: trainer}

The file is $SHARDSIM_SETTINGS, else ~/.config/shardsim/settings.yaml, if there is one. What the
environment says of an option (SHARDSIM_PLAN_TOP) counts more, what the command line says most.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from shardsim.errors import FileError, nearest, shown
from shardsim.files import check_keys, read_yaml

PREFIX = "SHARDSIM_"
VARIABLE = f"{PREFIX}SETTINGS"
OTHERS = (VARIABLE, f"{PREFIX}CACHE")


def name_variables(commands: Mapping[str, click.Command]) -> None:
    """Let the environment say every option by the name that people write: SHARDSIM_PLAN_WHY_NOT."""
    for name, command in commands.items():
        for item in _named(command).values():
            item.envvar = [
                f"{PREFIX}{name}_{option.removeprefix('--')}".upper().replace("-", "_")
                for option in item.opts
                if option.startswith("--")
            ]


def unknown_variables(commands: Mapping[str, click.Command]) -> list[str]:
    """Return a sentence for each variable of ours in the environment that nothing reads."""
    options = [item for command in commands.values() for item in _named(command).values()]
    known = {*OTHERS, *(name for item in options for name in item.envvar or ())}
    return [
        f"{name} is set, but no option has that name{nearest(name, known)}"
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and name not in known
    ]


def _named(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by their long names."""
    return {
        option.removeprefix("--"): item
        for item in command.params
        if isinstance(item, click.Option)
        for option in item.opts
        if option.startswith("--") and item.name
    }


def settings_file() -> Path | None:
    """Return the file of settings; None if there is none."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CONFIG_HOME")
    usual = (Path(base) if base else Path.home() / ".config") / "shardsim" / "settings.yaml"
    return usual if usual.is_file() else None


def read_settings(commands: Mapping[str, click.Command]) -> dict[str, dict[str, Any]]:
    """Return options by command as `click` takes them; raise `FileError` for what is none."""
    path = settings_file()
    if path is None:
        return {}
    data = check_keys(read_yaml(path) or {}, where=str(path), allowed=commands)
    return {
        name: _options(commands[name], given or {}, f"{path}: {name}")
        for name, given in data.items()
    }


def _options(command: click.Command, given: Any, where: str) -> dict[str, Any]:
    names = _named(command)
    found: dict[str, Any] = {}
    for key, value in check_keys(given, where=where, allowed=names).items():
        if isinstance(value, Mapping) or value is None:
            raise FileError(f"{where}: {key}: expected a value")
        item = names[key]
        if item.is_flag and not isinstance(value, bool):
            raise FileError(f"{where}: {key}: expected true or false, found {shown(value)}")
        several = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if any("\0" in one for one in several):
            raise FileError(f"{where}: {key}: a null byte is in no name")
        if len(several) != 1 and not item.multiple:
            raise FileError(f"{where}: {key}: expected one value, found {shown(value)}")
        found[str(item.name)] = value if item.is_flag else several if item.multiple else several[0]
    return found
