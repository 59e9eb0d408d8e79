"""Where operations come from: the tables of files, functions, lines and stack frames."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shardsim.xla.hlo.errors import HloError, small_number

_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_NAMED = re.compile(r'(\d+) "((?:[^"\\]|\\.)*)"')
_NUMBERED = re.compile(r"(\d+) \{([^{}]*)\}")


@dataclass(frozen=True)
class Frame:
    """One place of the source."""

    file: str
    line: int
    function: str


@dataclass(frozen=True)
class _Entry:
    frame: Frame
    parent: int  # 0: none


class Frames:
    """The stack frames of a module; operations name one by its number, from 1."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries
        self._added: dict[Frame, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, file: str, line: int) -> int:
        """Return the number of the frame of a place whose function and callers are not known."""
        frame = Frame(file=file, line=line, function="")
        if frame not in self._added:
            self._entries.append(_Entry(frame=frame, parent=0))
            self._added[frame] = len(self._entries)
        return self._added[frame]

    def stack(self, number: int) -> list[Frame]:
        """Return the frames from where the operation stands outwards; number 0 has none."""
        found = []
        while number:
            entry = self._entries[number - 1]
            found.append(entry.frame)
            number = entry.parent
        return found


def read_frames(lines: list[str], place: int) -> tuple[Frames, int]:
    """Return the tables that start at `place`, if any, and the first line after them."""
    tables: dict[str, list[str]] = {name: [] for name in _TABLES}
    seen: dict[str, int] = {}
    while place < len(lines):
        name = lines[place]
        if not name.strip():
            place += 1
            continue
        if name not in tables:
            break
        if name in seen:
            raise HloError(f"a second table {name}", place + 1)
        seen[name] = place + 1
        place += 1
        while place < len(lines) and lines[place].strip():
            tables[name].append(lines[place])
            place += 1
    if not seen:
        return Frames([]), place
    files = [text for (text,) in _rows(tables["FileNames"], _NAMED, seen.get("FileNames", 0))]
    functions = [
        text for (text,) in _rows(tables["FunctionNames"], _NAMED, seen.get("FunctionNames", 0))
    ]
    locations = []
    at = seen.get("FileLocations", 0)
    for row, (text,) in enumerate(_rows(tables["FileLocations"], _NUMBERED, at)):
        file, function, line = _fields(
            text, ("file_name_id", "function_name_id", "line"), at + row + 1
        )
        if not (0 < file <= len(files) and 0 < function <= len(functions)):
            raise HloError("a file location without file or function", at + row + 1)
        locations.append(Frame(file=files[file - 1], line=line, function=functions[function - 1]))
    entries = []
    at = seen.get("StackFrames", 0)
    for row, (text,) in enumerate(_rows(tables["StackFrames"], _NUMBERED, at)):
        location, parent = _fields(text, ("file_location_id", "parent_frame_id"), at + row + 1)
        # The text counts parents from 1 too, with 1 for none: a frame's parent comes before it.
        if not (0 < location <= len(locations) and 0 < parent <= row + 1):
            raise HloError("a stack frame without place or parent", at + row + 1)
        entries.append(_Entry(frame=locations[location - 1], parent=parent - 1))
    return Frames(entries), place


def _rows(lines: list[str], form: re.Pattern[str], at: int) -> list[tuple[str]]:
    """Return what stands in each row; rows are numbered from 1 without a gap."""
    rows: list[tuple[str]] = []
    for count, line in enumerate(lines, 1):
        match = form.fullmatch(line)
        if not match or small_number(match[1], 0) != count:
            raise HloError(f"row {count} of a table is {line[:60]!r}", at + count)
        rows.append((match[2],))
    return rows


def _fields(text: str, names: tuple[str, ...], line: int) -> list[int]:
    found = dict(re.findall(r"(\w+)=(\d+)", text))
    missing = [name for name in names if name not in found]
    if missing:
        raise HloError(f"no {missing[0]} in {text[:60]!r}", line)
    return [small_number(found[name], 0) for name in names]
