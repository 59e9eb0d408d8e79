"""Other people's trainer configs as plans. Nothing in them is executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shardsim.errors import FileError, ShardsimError
from shardsim.files import MAX_FILE_BYTES
from shardsim.plan import Plan, resolve
from shardsim.plan.legality import check
from shardsim.validate.imports.big_vision import read_big_vision
from shardsim.validate.imports.maxtext import read_maxtext


@dataclass(frozen=True)
class Imported:
    """A plan made of a config, and remarks on how it was read."""

    plan: Plan
    notes: tuple[str, ...]


def import_config(
    path: str,
    form: str,
    *,
    machine: str | None = None,
    image: int | None = None,
    base: Path | None = None,
) -> Imported:
    """Return the plan of a trainer's config.

    `machine` is the slice where the config does not say, `image` the pixels along an image of
    big_vision's, `base` the base.yml of the MaxText release that the config was written for.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file (UTF-8)") from None
    if len(text) > MAX_FILE_BYTES:
        raise FileError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        if form == "maxtext":
            plan, notes = read_maxtext(file, text, machine, base)
        else:
            plan, notes = read_big_vision(file, text, machine, image)
        check(plan, resolve(plan))
    except ShardsimError as error:
        raise type(error)(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return Imported(plan, tuple(notes))
