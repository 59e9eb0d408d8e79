"""The command `shardsim`, and `python -m shardsim`."""

import os
import signal
from types import FrameType

INTERRUPTED = 130  # as the shell has it


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: nothing is open yet, and an import that an exception leaves says another."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line; a Ctrl-C that comes while it is still loading is one line too."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # neither ignored, as under nohup, nor another's
        signal.signal(signal.SIGINT, _stop)
    from shardsim.cli.main import main as command

    signal.signal(signal.SIGINT, usual)
    command(prog_name="shardsim")


if __name__ == "__main__":
    main()
