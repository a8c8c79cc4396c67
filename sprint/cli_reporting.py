"""What every command does alike: a refusal is one line and an exit code, and so is output that can't be written.

Exit codes: 0 done, 1 the machine or a peer refused, 2 wrong usage or a bad configuration value, 130 interrupted, 141
(1, where rich or typer write) the reader of our output has gone. Whatever else is raised is a defect of ours, and shows
as Python shows it.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sprint.errors import ConfigError, SprintError

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130
READER_GONE: Final = 141
_UNWRITABLE: Final = frozenset({errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})


class UsageError(SprintError):
    """An argument or an option's value is not one of those that are possible."""


class _Closed(io.TextIOBase):
    """Stands for a standard output that was closed before we began: what is written there is refused, not lost."""

    def write(self, _text: str) -> NoReturn:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def prepare_streams() -> None:
    """Make the standard streams fit for use, whatever they were when we were started.

    A closed one's number would be taken by the next file that is opened, and whoever writes to standard error without
    asking Python would write into it. A letter that the terminal's encoding lacks is escaped.
    """
    for descriptor in (0, 1, 2):
        if not _is_open(descriptor):
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@contextmanager
def reporting() -> Iterator[None]:
    """Turn what was refused on purpose into one line on standard error and an exit code."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (ConfigError, UsageError) as error:
        _end(WRONG_USAGE, error)
    except SprintError as error:
        _end(REFUSED, error)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if not _is_of_our_output(error):
            raise
        _forget_output()
        if error.errno == errno.EPIPE:
            raise SystemExit(READER_GONE) from None
        _end(REFUSED, f"standard output: {error.strerror}")


def print_json(value: Any, indent: int | None = None) -> None:
    """One JSON value and a line feed on standard output; what its encoding lacks is escaped as JSON has it."""
    text = json.dumps(value, ensure_ascii=not _is_utf8(), indent=indent)
    sys.stdout.write(f"{text}\n")


def _is_utf8() -> bool:
    with suppress(LookupError):
        return codecs.lookup(sys.stdout.encoding or "").name == "utf-8"
    return False


def _is_of_our_output(error: OSError) -> bool:
    """Whether it came of writing to standard output: what couldn't be written stays in its buffer, if it has one."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return error.filename is None and error.errno in _UNWRITABLE


def _forget_output() -> None:
    """Python flushes once more when it ends, and would complain in words of its own."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


def _end(code: int, what: object) -> NoReturn:
    """One line, whatever the message holds."""
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(what))
    with suppress(OSError):
        print(f"sprint: {line}", file=sys.stderr, flush=True)  # noqa: T201 - this is what it is for
    raise SystemExit(code) from None
