"""The text of an HLO module, parsed strictly: what is not understood is an error with its line."""

from __future__ import annotations

import json
import re
from typing import Any

from shardsim.xla.hlo.errors import HloError, small_number
from shardsim.xla.hlo.frames import Frames, read_frames
from shardsim.xla.hlo.module import Computation, Instruction, Module
from shardsim.xla.hlo.opcodes import OPCODES
from shardsim.xla.hlo.shapes import Shape, closing, parse_shape, shape_end

_MODULE = re.compile(r"HloModule ([\w.\-]+)(, .*)?$")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(")
_PARAMETER = re.compile(r"(?:, )?(?:/\*index=\d+\*/)?%?([\w.\-]+): ")
_START = re.compile(r"  (ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
# Dumps write an element of a tuple as `%tuple#2`.
_OPERAND = re.compile(r"(?:/\*index=\d+\*/)?%([\w.\-]+(?:#\d+)*)")
_OPERANDS = re.compile(rf"(?:{_OPERAND.pattern}(?:, {_OPERAND.pattern})*)?")
_KEY = re.compile(r", ([a-z_][\w-]*)=")
_METADATA = re.compile(r"(?:^|\s)(\w+)=(\"(?:[^\"\\]|\\.)*\"|[\w.\-]+|\{[^{}]*\})")
_BRACES = re.compile(r'[{}]|"(?:[^"\\]|\\.)*"')
_WORD = re.compile(
    r"mesh\[[^\]]*\](?:, device_ids=\([^ ]*\))? \{[^}]*\}"
    r"|\[[\d,]*\](?:<=\[[\d,]*\](?:T\([\d,]+\))?)?"
    r'|"(?:[^"\\]|\\.)*"'
    r'|[^,\s{}"\[\]]+'
)
_LISTED = re.compile(r"\{\{[\d,{}]*\}\}")
_OPEN = "kernel_metadata={"  # the attribute of a kernel that goes on over several lines
LONGEST_METADATA = 8  # lines
_decode = json.JSONDecoder().raw_decode


def parse_module(text: str) -> Module:
    """Parse `text`, what `compiled.as_text()` gives; raise `HloError` for what is none.

    What is wrong with its last line is most likely that it ends too early.
    """
    lines = text.splitlines()
    try:
        return _module(lines)
    except HloError as error:
        if 1 < len(lines) == error.line and "the text" not in error.problem:
            raise HloError(f"the text is cut off: {error.problem}", error.line) from None
        raise


def _module(lines: list[str]) -> Module:
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    match = _MODULE.match(lines[first]) if lines else None
    if not match:
        raise HloError("the text does not begin with 'HloModule NAME'", first + 1)
    rest = match[2] or ""
    partitions = re.search(r", num_partitions=(\d+)", rest)
    replicas = re.search(r", replica_count=(\d+)", rest)
    frames, place = read_frames(lines, first + 1)
    computations: dict[str, Computation] = {}
    entry = ""
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        computation, is_entry, place = _computation(lines, place, frames)
        if computation.name in computations:
            raise HloError(f"computation %{computation.name} appears twice", computation.line)
        computations[computation.name] = computation
        if is_entry and entry:
            raise HloError("two ENTRY computations", computation.line)
        entry = computation.name if is_entry else entry
    if not entry:
        raise HloError("no ENTRY computation; the text is cut off", len(lines))
    _check_calls(computations)
    return Module(
        name=match[1],
        is_scheduled=", is_scheduled=true" in rest,
        partitions=small_number(partitions[1], 0) if partitions else None,
        replicas=small_number(replicas[1], 0) if replicas else 1,
        computations=computations,
        entry=entry,
        frames=frames,
    )


def _check_calls(computations: dict[str, Computation]) -> None:
    """Refuse calls of what does not stand before the call: nothing calls itself."""
    before: set[str] = set()
    for computation in computations.values():
        for instruction in computation.instructions.values():
            for name in instruction.called:
                if name not in before:
                    raise HloError(f"no computation %{name} before its call", instruction.line)
        before.add(computation.name)


def _computation(lines: list[str], start: int, frames: Frames) -> tuple[Computation, bool, int]:
    """Return the computation whose header is line `start`, and the line after it."""
    header = _HEADER.match(lines[start])
    if not header or not lines[start].endswith(" {"):
        raise HloError(f"not the header of a computation: {lines[start][:60]!r}", start + 1)
    try:
        parameters, result = _signature(lines[start], header.end())
    except HloError as error:
        raise error.at(start + 1) from None
    instructions: dict[str, Instruction] = {}
    place = start + 1
    root = ""
    while True:
        if place == len(lines):
            raise HloError(f"the text ends inside computation %{header[2]}", place)
        line = lines[place]
        place += 1
        if line.endswith(_OPEN):
            line, place = _joined(lines, place)
        if line == "}" or line.startswith("}, execution_thread="):
            break
        try:
            instruction = _instruction(line, place, frames)
        except HloError as error:
            raise error.at(place) from None
        if instruction.name in instructions:
            raise HloError(f"%{instruction.name} is defined twice", place)
        for operand in instruction.operands:
            if "#" in operand:
                _take_elements(operand, instructions, place)
            if operand not in instructions:
                raise HloError(f"operand %{operand} is not defined before it is used", place)
        if instruction.stack_frame_id > len(frames):
            raise HloError(f"no stack frame {instruction.stack_frame_id}", place)
        instructions[instruction.name] = instruction
        if instruction.is_root:
            if root:
                raise HloError(f"computation %{header[2]} has two ROOTs", place)
            root = instruction.name
    if not root:
        raise HloError(f"computation %{header[2]} has no ROOT", place)
    if instructions[root].shape.form != result.form:
        raise HloError(f"%{root} is not the {result.form} that its header says", place)
    _check_parameters(header[2], parameters, instructions)
    computation = Computation(
        name=header[2],
        instructions=instructions,
        parameters=tuple(name for name, _ in parameters),
        root=root,
        line=start + 1,
    )
    return computation, bool(header[1]), place


def _take_elements(operand: str, instructions: dict[str, Instruction], line: int) -> None:
    """Add the get-tuple-elements for which `%tuple#2` stands."""
    source, *places = operand.split("#")
    for place in places:
        name = f"{source}#{place}"
        if name not in instructions and source in instructions:
            shape = instructions[source].shape
            index = small_number(place, len(shape.elements))
            if not shape.is_tuple or index >= len(shape.elements):
                raise HloError(f"%{source} has no element {place}", line)
            instructions[name] = Instruction(
                name=name,
                opcode="get-tuple-element",
                shape=shape.elements[index],
                operands=(source,),
                literal="",
                attributes={"index": str(index)},
                op_name="",
                stack_frame_id=0,
                backend_config={},
                is_root=False,
                line=line,
            )
        source = name


def _joined(lines: list[str], place: int) -> tuple[str, int]:
    """Return the instruction before `place` with the lines that it goes on for, and the next."""
    for end in range(place, min(place + LONGEST_METADATA, len(lines))):
        if lines[end].startswith("}}"):
            return "".join(lines[place - 1 : end + 1]), end + 1
    raise HloError("kernel_metadata has no end", place)


def _signature(line: str, place: int) -> tuple[list[tuple[str, Shape]], Shape]:
    """Return names and shapes of the parameters, and the shape of the result."""
    parameters = []
    while not line.startswith(")", place):
        name = _PARAMETER.match(line, place)
        if not name:
            raise HloError(f"not a parameter: {line[place : place + 60]!r}")
        end = shape_end(line, name.end())
        parameters.append((name[1], parse_shape(line[name.end() : end])))
        place = end
    if not line.startswith(") -> ", place):
        raise HloError("a computation's header without result")
    return parameters, parse_shape(line[place + 5 : -2])


def _check_parameters(
    name: str, parameters: list[tuple[str, Shape]], instructions: dict[str, Instruction]
) -> None:
    given = [item for item in instructions.values() if item.opcode == "parameter"]
    if len(given) != len(parameters):
        raise HloError(f"%{name} has {len(given)} parameters, its header {len(parameters)}")
    for item in given:
        number = small_number(item.literal, len(parameters))
        if number >= len(parameters) or parameters[number][0] != item.name:
            raise HloError(f"%{item.name} is not parameter {item.literal} of %{name}", item.line)
        if parameters[number][1].form != item.shape.form:
            raise HloError(f"%{item.name} is not what the header of %{name} says", item.line)


def _instruction(line: str, number: int, frames: Frames) -> Instruction:
    start = _START.match(line)
    if not start:
        raise HloError(f"not an instruction: {line[:60]!r}")
    end = shape_end(line, start.end())
    shape = parse_shape(line[start.end() : end])
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise HloError(f"%{start[2]}: no operation after the shape")
    if opcode[1] not in OPCODES:
        raise HloError(f"%{start[2]}: unknown operation '{opcode[1]}'")
    literal = ""
    operands: tuple[str, ...] = ()
    if opcode[1] in ("constant", "parameter"):
        close = closing(line, opcode.end() - 1)
        literal = line[opcode.end() : close - 1]
    else:
        close = line.find(")", opcode.end()) + 1
        inside = line[opcode.end() : close - 1]
        if not close or not _OPERANDS.fullmatch(inside):
            raise HloError(f"%{start[2]}: operands {inside[:60]!r}")
        operands = tuple(_OPERAND.findall(inside))
    attributes: dict[str, str] = {}
    config: dict[str, Any] = {}
    op_name, frame = "", 0
    seen = set()
    while close < len(line):
        key = _KEY.match(line, close)
        if not key or key[1] in seen:
            raise HloError(f"%{start[2]}: attribute {line[close : close + 60]!r}")
        seen.add(key[1])
        if key[1] == "backend_config" and line.startswith("{", key.end()):
            try:
                config, close = _decode(line, key.end())
            except ValueError:
                raise HloError(f"%{start[2]}: backend_config is not JSON") from None
            continue
        value, close = _value(line, key.end())
        if key[1] == "metadata":
            op_name, frame = _metadata(value, frames)
        else:
            attributes[key[1]] = value
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        shape=shape,
        operands=operands,
        literal=literal,
        attributes=attributes,
        op_name=op_name,
        stack_frame_id=frame,
        backend_config=config,
        is_root=bool(start[1]),
        line=number,
    )


def _value(line: str, start: int) -> tuple[str, int]:
    """Return the value of an attribute that starts at `start`, and where it ends."""
    if groups := _LISTED.match(line, start):
        return groups[0], groups.end()
    if line.startswith("{", start):
        depth = 0
        for match in _BRACES.finditer(line, start):
            depth += (match[0] == "{") - (match[0] == "}")
            if depth == 0:
                return line[start : match.end()], match.end()
        raise HloError("unbalanced braces")
    word = _WORD.match(line, start)
    if not word:
        raise HloError(f"attribute value {line[start : start + 60]!r}")
    return word[0], word.end()


def _metadata(text: str, frames: Frames) -> tuple[str, int]:
    """Return op_name and stack frame of `{op_name="..." stack_frame_id=12}`.

    XLA before 2025 wrote `source_file="..." source_line=7` instead: such a place becomes a frame.
    """
    found = dict(_METADATA.findall(text[1:-1]))
    frame = small_number(found.get("stack_frame_id", "0"), -1)
    line = small_number(found.get("source_line", "0"), -1)
    if frame < 0 or line < 0:
        raise HloError(f"metadata {text[:60]!r}")
    if not frame and "source_file" in found:
        frame = frames.add(found["source_file"].strip('"'), line)
    return found.get("op_name", '""')[1:-1], frame
