"""How many parameters a model has by those who published it, beside what its graph has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardsim.errors import ModelError
from shardsim.model.catalog import preset


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published number of parameters; the preset's source says where it stands.

    It has `less` of them, for the reason in `why`. Numbers in millions are right to `within`.

    >>> from shardsim.model import load_model
    >>> published_count("dit-xl-2").agrees(load_model("dit-xl-2").parameters)
    True
    """

    parameters: int
    within: int = 0
    less: int = 0
    why: str = ""

    @property
    def expected(self) -> int:
        """What the preset should have."""
        return self.parameters - self.less

    def agrees(self, parameters: int) -> bool:
        """Return whether a number of parameters is the published one."""
        return abs(parameters - self.expected) <= self.within


def published_count(name: str) -> Published:
    """Return the published count of a preset; raise `ModelError` for one without."""
    found = preset(name).get("published")
    if found is None:
        raise ModelError(f"model {name}: no count of its parameters is known")
    return Published(**found) if isinstance(found, Mapping) else Published(parameters=found)
