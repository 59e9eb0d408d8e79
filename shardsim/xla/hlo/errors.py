"""What the reader of compiled programs raises."""

from __future__ import annotations

from shardsim.errors import ShardsimError

LONGEST = 200  # characters of a message; names in a text may be of any length


class HloError(ShardsimError):
    """A compiled program's text is damaged, or holds what the reader does not understand.

    `line` is the line of the text, counted from 1; 0 where none is to blame.
    """

    def __init__(self, problem: str, line: int = 0) -> None:
        problem = problem if len(problem) <= LONGEST else f"{problem[:LONGEST]}..."
        super().__init__(f"HLO line {line}: {problem}" if line else f"HLO: {problem}")
        self.problem = problem
        self.line = line

    def at(self, line: int) -> HloError:
        """Return the same error with a line, unless it has one."""
        return self if self.line else HloError(self.problem, line)


def small_number(text: str, otherwise: int, digits: int = 9) -> int:
    """Return a whole number of at most so many digits, or `otherwise` if `text` is none.

    >>> small_number("48", -1), small_number("4e8", -1), small_number("9" * 5000, -1)
    (48, -1, -1)
    """
    return int(text) if text.isdecimal() and len(text) <= digits else otherwise
