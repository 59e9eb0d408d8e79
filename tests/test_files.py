"""Reading YAML safely and writing files whole."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsim.errors import FileError, PlanError
from shardsim.files import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    check_keys,
    check_writable,
    parse_yaml,
    read_yaml,
    write_text,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e9", 1e9),
        ("275e12", 275e12),
        ("-2.5E-3", -2.5e-3),
        ("1.5", 1.5),
        ("42", 42),
        ("-9223372036854775808", -(2**63)),
        ("0x10", 16),
        ("2020-01-01", "2020-01-01"),
        ("2020-13-45", "2020-13-45"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("v4:8x8x16", "v4:8x8x16"),
        ("", None),
        ("'1e9'", "1e9"),
        ("{a: [1, b], c: {}}", {"a": [1, "b"], "c": {}}),
        ("{on: 1, No: 2, yes: true}", {"on": 1, "No": 2, "yes": True}),
    ],
)
def test_what_is_read(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "here: line 2: key 'a' appears twice"),
        ("a: {b: 1, b: 2}", "here: line 1: key 'b' appears twice"),
        ("{on: 1, 'on': 2}", "here: line 1: key 'on' appears twice"),
        ("a: &x 1\nb: *x", "here: line 2: YAML aliases (*name) are not accepted"),
        ("!!python/object/apply:os.system [ls]",
         "here: line 1: YAML tags (!word) are not accepted"),
        ("a: !!binary aGk=", "here: line 1: YAML tags (!word) are not accepted"),
        ("a: !!set {x}", "here: line 1: YAML tags (!word) are not accepted"),
        ("a: !mine 1", "here: line 1: YAML tags (!word) are not accepted"),
        ("? [a, b]\n: 1", "here: line 1: a key must be a plain word"),
        ("a: 9223372036854775809", "here: line 1: a whole number beyond 2^63"),
        ("a: 1\nb: 00100", "here: line 2: 00100: with a leading zero it is 100 to some readers of "
             "YAML and octal to others; leave the zero out, or quote a name"),
        ("a: 0x" + "f" * 5000, "here: line 1: a whole number beyond 2^63"),
        ("\na: 1" + "0" * 5000, "here: line 2: a whole number beyond 2^63"),
        ("[" * (MAX_DEPTH + 1), f"here: line 1: nested deeper than {MAX_DEPTH} levels"),
        ("a: 1\n---\nb: 2", "here: line 2: not valid YAML: but found another document"),
        ("x" * (MAX_FILE_BYTES + 1), f"here: larger than {MAX_FILE_BYTES} bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(FileError) as caught:
        parse_yaml(text, "here")
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["a: [", "\x1b[31m", "a\tb: {", "\udcff", "%YAML 9.9\n---\n1",
                                  "a: =", "<<: 1", "\x00", "]", "a: b: c", "@", "`"])  # fmt: skip
def test_what_is_no_yaml(text: str) -> None:
    with pytest.raises(FileError, match=r"^here: "):
        parse_yaml(text, "here")


def test_a_million_laughs_end_at_the_first_alias() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(FileError, match="line 2: YAML aliases"):
        parse_yaml("\n".join(lines), "here")


def test_too_many_nodes() -> None:
    with pytest.raises(FileError, match="more than 200000 YAML nodes"):
        parse_yaml("[" + "1," * 250_000 + "]", "here")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text, "here")
    except FileError as error:
        message = str(error)
        assert message.startswith("here: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(FileError, match="Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(FileError, match="not the name of a file"):
        read_yaml("a\0b")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FileError, match=r"not a text file \(UTF-8\)"):
        read_yaml(binary)
    empty = tmp_path / "empty"
    empty.write_text("", encoding="utf-8")
    assert read_yaml(empty) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_files_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("a: 1", encoding="utf-8")
    path.chmod(0)
    with pytest.raises(FileError, match="Permission denied"):
        read_yaml(path)
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="no permission to write"):
        check_writable(tmp_path / "new")
    tmp_path.chmod(0o700)


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old", encoding="utf-8")
    write_text(path, "new é\n")
    assert path.read_text(encoding="utf-8") == "new é\n"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(FileError, match="cannot write"):
        write_text(folder, "new")
    with pytest.raises(FileError, match="cannot write"):
        write_text(tmp_path / "gone" / "out", "new")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    check_writable("new")
    with pytest.raises(FileError, match="there is no folder"):
        check_writable(tmp_path / "gone" / "new")
    with pytest.raises(FileError, match="it is a folder"):
        check_writable(tmp_path)


def test_check_keys() -> None:
    data = {"a": 1, "b": 2}
    assert check_keys(data, where="here", allowed=("a", "b"), required=("a",)) is data
    with pytest.raises(FileError, match=r"^here: unknown key 'b'; choose from: a$"):
        check_keys(data, where="here", allowed=("a",))
    with pytest.raises(PlanError, match=r"^here: missing key 'c'$"):
        check_keys(data, where="here", allowed=("a", "b"), required=("c",), error=PlanError)
    for value in (None, [], "a", 1):
        with pytest.raises(FileError, match=r"^here: expected a mapping of keys, found "):
            check_keys(value, where="here", allowed=())


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        found = reader.submit(pipe.read_text, encoding="utf-8")
        write_text(pipe, "a plan\n")
        assert found.result(timeout=10) == "a plan\n"
    assert pipe.is_fifo()
