"""What an import took from a file and what it left: nothing is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardsim.errors import FileError, shown

TIME, HBM = "time", "hbm"
BOTH = (TIME, HBM)


@dataclass(frozen=True)
class NotCarried:
    """A key of a file that is in no plan: why, and which of `BOTH` it could change."""

    key: str
    value: Any
    why: str
    could_change: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "key": self.key,
            "value": self.value,
            "why": self.why,
            "could_change": list(self.could_change),
        }

    def __str__(self) -> str:
        """Return one line: `not carried: lora_rank = 16: ... (could change time, hbm)`."""
        effect = f" (could change {', '.join(self.could_change)})" if self.could_change else ""
        return f"not carried: {self.key} = {written(self.value)}: {self.why}{effect}"


@dataclass(frozen=True)
class Reason:
    """Why a key is in no plan; with the value `usual` it changes nothing."""

    why: str
    could_change: tuple[str, ...] = ()
    usual: tuple[Any, ...] = ()

    def of(self, key: str, value: Any) -> NotCarried:
        """Return what is left of a key with its value."""
        same = any(type(value) is type(one) and value == one for one in self.usual)
        return NotCarried(key, value, self.why, () if same else self.could_change)


class Keys(Mapping[str, Any]):
    """What a file gives, over defaults; remembers which keys were read.

    >>> keys = Keys({"width": 8, "colour": "red"}, {"depth": 2})
    >>> keys["width"] * keys["depth"], keys.unread()
    (16, ['colour'])
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.given = given
        self.defaults = defaults
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """Return a value, the file's or the default, and take the key as read."""
        self.read.add(key)
        return self.given[key] if key in self.given else self.defaults[key]

    def __iter__(self) -> Any:
        """Go over all keys, the file's and those with a default."""
        return iter({**self.defaults, **self.given})

    def __len__(self) -> int:
        """Return the number of all keys."""
        return len({**self.defaults, **self.given})

    def __contains__(self, key: object) -> bool:
        """Return whether a key has a value; that does not read it."""
        return key in self.given or key in self.defaults

    def unread(self) -> list[str]:
        """Return the file's keys that nothing has read, in its order."""
        return [key for key in self.given if key not in self.read]

    def count(self, key: str, least: int = 1, most: int = 10**9) -> int:
        """Return a whole number within bounds."""
        value: Any = self[key] if key in self else None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            raise FileError(
                f"{key}: expected a whole number from {least} to {most:,}, found {shown(value)}"
            )
        return int(value)

    def count_or(self, key: str, default: int) -> int:
        """Return a positive whole number, or `default` for null or no key."""
        return default if key not in self or self[key] is None else self.count(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self[key]
        if not isinstance(value, bool):
            raise FileError(f"{key}: expected true or false, found {shown(value)}")
        return value


def is_one_of(value: Any, choices: Collection[Any]) -> bool:
    """Return whether a value of a file is among choices; lists and mappings are among none."""
    return not isinstance(value, (list, dict, set, tuple)) and value in choices


def written(value: Any) -> str:
    """Return a value for a message as YAML has it.

    >>> written(True), written(None), written("off")
    ('true', 'null', "'off'")
    """
    plain = value is None or isinstance(value, bool)
    return json.dumps(value) if plain else shown(value)
