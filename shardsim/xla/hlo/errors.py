"""What the reader of compiled programs raises."""

from __future__ import annotations

from shardsim.errors import ShardsimError


class HloError(ShardsimError):
    """A compiled program's text is damaged, or holds what the reader does not understand.

    `line` is the line of the text, counted from 1; 0 where none is to blame.
    """

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(f"HLO line {line}: {problem}" if line else f"HLO: {problem}")
        self.problem = problem
        self.line = line

    def at(self, line: int) -> HloError:
        """Return the same error with a line, unless it has one."""
        return self if self.line else HloError(self.problem, line)
