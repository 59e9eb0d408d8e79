"""The command `shardsim`, and `python -m shardsim`."""

import errno
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # as the shell has it
# What a write to a terminal, a pipe or a redirected file ends with where there is no room for it.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once: nothing is open yet, and an import that an exception leaves says another."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Give a stream that is closed (`>&-`) nowhere to write to, as Python has none for it then."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if number == 0 else "w", encoding="utf-8")
            if stream.fileno() != number:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def main() -> None:
    """Run the command line; a Ctrl-C that comes while it is still loading is one line too."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # neither ignored, as under nohup, nor another's
        signal.signal(signal.SIGINT, _stop)
    _open_streams()
    from shardsim.cli.main import main as command

    signal.signal(signal.SIGINT, usual)
    try:
        command(prog_name="shardsim")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        os.write(2, f"error: cannot write the answer: {os.strerror(error.errno)}\n".encode())
        os._exit(2)  # Python would try again to write what is left


if __name__ == "__main__":
    main()
