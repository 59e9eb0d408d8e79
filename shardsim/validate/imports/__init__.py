"""Other people's trainer configs as plans. Nothing in them is executed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shardsim.carried import NotCarried
from shardsim.errors import FileError, ShardsimError
from shardsim.files import read_text
from shardsim.plan import Plan, resolve
from shardsim.plan.legality import check
from shardsim.validate.imports.axlearn import read_axlearn
from shardsim.validate.imports.big_vision import read_big_vision
from shardsim.validate.imports.levanter import read_levanter
from shardsim.validate.imports.maxtext import read_maxtext

# What a file of a form is, where it is none.
_CONFIG = "Python with get_config()"
_EXPECTED = {
    "maxtext": "MaxText's YAML, or a script that starts a training",
    "axlearn": "a run's trainer_config, or give the name of an experiment: fuji-7B-v2-flash",
    "levanter": "the YAML of levanter.main.train_lm",
}


@dataclass(frozen=True)
class Imported:
    """A plan made of a config, remarks on how it was read, and what of it is in no plan."""

    plan: Plan
    notes: tuple[str, ...]
    not_carried: tuple[NotCarried, ...]


def import_config(
    path: str,
    form: str,
    *,
    machine: str | None = None,
    image: int | None = None,
    base: Path | None = None,
) -> Imported:
    """Return the plan of a trainer's config.

    `machine` is the slice where the config does not say, `base` the base.yml of the MaxText release
    that the config was written for, `image` the pixels along an image of big_vision's. Its own
    arguments may stand behind its name, as `vit_i1k.py:variant=L/16`. Of `axlearn` the path may be
    the name of a published experiment.
    """
    if not path:
        raise FileError(f"a config's name is empty; give {_EXPECTED.get(form, _CONFIG)}")
    arguments = ""
    if form == "big_vision" and not os.path.exists(path) and ".py:" in path:
        path, _, arguments = path.partition(".py:")
        path += ".py"
    file = Path(path)
    experiment = form == "axlearn" and "/" not in path and not os.path.exists(path)
    return import_text(
        file,
        None if experiment else read_text(file),
        form,
        machine=machine,
        image=image,
        base=base,
        arguments=arguments,
    )


def import_text(
    file: Path,
    text: str | None,
    form: str,
    *,
    machine: str | None = None,
    image: int | None = None,
    base: Path | None = None,
    arguments: str = "",
) -> Imported:
    """Return the plan of a config's text; `file` is where it stands, or an experiment's name."""
    said = text or ""
    if text is not None and not said.strip():
        raise FileError(f"{file}: the file is empty; expected {_EXPECTED.get(form, _CONFIG)}")
    try:
        if form == "maxtext":
            plan, notes, left = read_maxtext(file, said, machine, base)
        elif form == "axlearn":
            plan, notes, left = read_axlearn(file, text, machine)
        elif form == "levanter":
            plan, notes, left = read_levanter(file, said, machine)
        else:
            plan, notes, left = read_big_vision(file, said, machine, image, arguments)
        check(plan, resolve(plan))
    except ShardsimError as error:
        raise type(error)(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    return Imported(plan, tuple(notes), tuple(left))
