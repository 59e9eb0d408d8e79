"""Options of the TPU compiler that a plan names: checked words, never anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsim.errors import PlanError, shown
from shardsim.machine.chip import SCOPED_VMEM_KIB

_NAME = re.compile(r"xla_[a-z0-9_]{1,95}")
_VALUE = re.compile(r"[A-Za-z0-9_.,:+-]{1,200}")
_KIB = re.compile(r"[1-9][0-9]{0,8}")  # it decides by which costs a plan is priced


def parse_compiler_options(data: Any) -> dict[str, str]:
    """Return options by name, values as the compiler takes them: words, "true" and "false".

    >>> parse_compiler_options({"xla_tpu_enable_latency_hiding_scheduler": True})
    {'xla_tpu_enable_latency_hiding_scheduler': 'true'}
    """
    if not isinstance(data, Mapping):
        raise PlanError(
            "compiler_options: expected names of options, each with its value, such as "
            f"{{{SCOPED_VMEM_KIB}: 65536}}"
        )
    options = {}
    for name, value in data.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PlanError(
                f"compiler_options: {_show(name)} is no option's name, such as "
                "xla_tpu_scoped_vmem_limit_kib"
            )
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not isinstance(value, (bool, int, float, str)) or not _VALUE.fullmatch(text):
            raise PlanError(
                f"compiler_options.{name}: must be true, false, a number or a word, not "
                f"{_show(value)}"
            )
        if name == SCOPED_VMEM_KIB and not _KIB.fullmatch(text):
            raise PlanError(
                f"compiler_options.{name}: must be a positive whole number of KiB, not "
                f"{_show(value)}"
            )
        options[name] = text
    return options


def _show(value: Any) -> str:
    return shown(value).encode("ascii", "backslashreplace").decode("ascii")
