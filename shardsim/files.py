"""Reading YAML safely, checking keys, and finding the data that ships with the package."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from shardsim.errors import FileError, nearest

# A plan or a hardware file is a few KiB; a file of published runs some tens. The limits are far
# above that and far below what would make a machine swap.
MAX_FILE_BYTES = 2_000_000
MAX_NODES = 200_000
MAX_DEPTH = 64
LARGEST_INT = 2**63  # beyond it is no count of anything, and some cannot even be printed

# Numbers to YAML 1.2 and to this module, though not to YAML 1.1: whoever writes such a text as
# YAML must quote it.
EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


def _loader() -> Any:
    """Return a safe loader that refuses duplicate keys and huge whole numbers.

    It reads `1e9` and `275e12` as numbers, dates and the key `on` as text, as YAML 1.2 does;
    PyYAML's YAML 1.1 would make text, objects and a truth value of them.
    """
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    resolvers = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    loader: Any = type("_Loader", (base,), {"yaml_implicit_resolvers": resolvers})
    loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
    loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
    loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_FLOAT, list("-+0123456789"))
    return loader


def _construct_int(loader: Any, node: Any) -> int | str:
    """Return a whole number. 0100 is 64 to YAML 1.1 and 100 to YAML 1.2, so it is refused; 12:30
    is no number to YAML 1.2."""
    value: int = 0
    line = node.start_mark.line + 1
    if ":" in node.value:
        return str(node.value)
    if re.fullmatch(r"[-+]?0[0-9_]+", node.value) and node.value.strip("+-0_"):
        plain = node.value.replace("_", "").lstrip("+-0")
        raise FileError(
            f"line {line}: {node.value[:40]}: with a leading zero it is {plain[:40]} to some "
            "readers of YAML and octal to others; leave the zero out, or quote a name"
        )
    if len(node.value) <= 80:
        value = loader.construct_yaml_int(node)
    if len(node.value) > 80 or abs(value) > LARGEST_INT:
        raise FileError(f"line {line}: a whole number beyond 2^63")
    return value


def _construct_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, bool):  # on, off, yes: names, as in YAML 1.2
            key = key_node.value
        if not isinstance(key, (str, int, float, type(None))):
            raise FileError(f"line {line}: a key must be a plain word")
        if key in seen:
            raise FileError(f"line {line}: key '{key}' appears twice")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_LOADER: Any = _loader()


def _refuse_bombs(text: str) -> None:
    """Refuse aliases ("billion laughs"), tags, too many nodes and levels, before building."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.events.AliasEvent):
            raise FileError(f"line {line}: YAML aliases (*name) are not accepted")
        if isinstance(event, yaml.events.NodeEvent):
            nodes += 1
            if getattr(event, "tag", None) not in (None, "!"):
                raise FileError(f"line {line}: YAML tags (!word) are not accepted")
        if isinstance(event, yaml.events.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.events.CollectionEndEvent):
            depth -= 1
        if nodes > MAX_NODES:
            raise FileError(f"line {line}: more than {MAX_NODES} YAML nodes")
        if depth > MAX_DEPTH:
            raise FileError(f"line {line}: nested deeper than {MAX_DEPTH} levels")


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; raise `FileError` naming `where` if it is not acceptable."""
    if len(text) > MAX_FILE_BYTES:
        raise FileError(f"{where}: larger than {MAX_FILE_BYTES} bytes")
    try:
        _refuse_bombs(text)
        return yaml.load(text, Loader=_LOADER)
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise FileError(f"{where}:{line} not valid YAML: {problem}") from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise FileError(f"{where}: not valid YAML: {str(error)[:80]}") from None


def flow_text(value: Any) -> str:
    """Return a value as a line of YAML, a text as it is.

    >>> flow_text({"save": ["qkv"], "offload": []}), flow_text(8e9), flow_text(True)
    ('{offload: [], save: [qkv]}', '8000000000', 'true')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read one YAML document from `path`."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file of at most `MAX_FILE_BYTES`."""
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file (UTF-8)") from None
    except ValueError:
        raise FileError(f"{path!r}: not the name of a file") from None
    if len(text) > MAX_FILE_BYTES:
        raise FileError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    return text


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` whole or not at all: a temporary file beside `path`, then a rename.

    A device or a pipe (/dev/null, /dev/stdout) is written to; a rename would replace it.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` whole or not at all, as `write_text` does."""
    target = Path(path)
    temporary = ""
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
            return
        with tempfile.NamedTemporaryFile(
            "wb", dir=target.parent, prefix=".shardsim-", delete=False
        ) as handle:
            temporary = handle.name
            handle.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise `FileError` if `write_text` could not write `path`: before the work, not after it."""
    folder = os.path.dirname(os.fspath(path)) or "."
    if not os.path.isdir(folder):
        raise FileError(f"cannot write {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise FileError(f"cannot write {path}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise FileError(f"cannot write {path}: no permission to write in {folder}")


def check_keys(
    data: Any,
    *,
    where: str,
    allowed: Iterable[str],
    required: Iterable[str] = (),
    error: type[FileError] | type[Exception] = FileError,
    words: Mapping[str, Iterable[str]] | None = None,
    example: str = "",
) -> Mapping[str, Any]:
    """Return `data` if it is a mapping with all `required` and only `allowed` keys.

    `words` are the values of some keys: one in place of the mapping is answered with its key,
    anything else with an `example`, or the first word.
    """
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else type(data).__name__
        hint = _keyed(data, words or {}, example)
        raise error(f"{where}: expected a mapping of keys, found {found}{hint}")
    allowed = list(allowed)
    for key in data:
        if key not in allowed:
            raise error(f"{where}: unknown key '{key}'{nearest(key, allowed)}")
    for key in required:
        if key not in data:
            raise error(f"{where}: missing key '{key}'")
    return data


def _keyed(data: Any, words: Mapping[str, Iterable[str]], example: str) -> str:
    """Return the mapping that a word in its place stands for, or one as an example."""
    value = data[0] if isinstance(data, list) and len(data) == 1 else data
    value = "off" if value is False else value  # as YAML 1.1 reads a bare off
    for key, choices in words.items():
        if isinstance(value, str) and value in choices:
            return f"; write {{{key}: {value}}}"
    first = (f"{{{key}: {next(iter(choices))}}}" for key, choices in words.items())
    example = example or next(first, "")
    return f", such as {example}" if example else ""


def data_folder(name: str) -> Path:
    """Return the folder `hardware` or `plans`: inside the wheel, or beside the checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "data" / name
    return shipped if shipped.is_dir() else package.parent / name
