"""The command line: parse, call, print; no logic. Results go to stdout, progress and errors to stderr.

Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any, NoReturn

import typer

from edgec import console
from edgec.cli import build, measure, show
from edgec.cli.options import STATE, app
from edgec.errors import EdgecError

__all__ = ["app", "build", "main", "measure", "show"]


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line; every failure is one line on stderr and an exit code that is not 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = sys.argv[1:] if argv is None else argv
    if "--debug" in given:  # wherever it stands: people append it to the command that failed
        given = ["--debug", *(word for word in given if word != "--debug")]
    code = 1
    try:
        code = int(app(args=given, prog_name="edgec", standalone_mode=False) or 0)
        if code == 130:  # how typer reports Ctrl-C
            raise KeyboardInterrupt
    except EdgecError as error:
        code = _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; no output was changed", 130)
    except MemoryError:
        code = _fail(_OUT_OF_MEMORY, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
    except Exception as error:  # noqa: BLE001  the last line of defence: a bug is one line too, unless --debug
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            code = 2
        elif type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            code = _fail(f"{error.format_message().rstrip('.')}; see `{_help_command(error)}`", 2)
        elif "not enough memory" in str(error):  # torch's allocator
            code = _fail(_OUT_OF_MEMORY, 1)
        else:
            code = _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug, and report it)", 70)
    if code == 130 and argv is None:
        # An interrupt that met an exec() (imports are full of them) marks the interpreter, which then ends by the
        # signal, whatever exit code it is given. Everything of ours is put away by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


_OUT_OF_MEMORY = "out of memory; close other programs, or choose a smaller model"


def _fail(message: str, code: int) -> int:
    if STATE["debug"] and sys.exc_info()[0] is not None:
        logging.getLogger(__name__).exception("failed")
    sys.stderr.write(f"edgec: error: {console.printable(message)}\n")
    return code


def _help_command(error: Any) -> str:
    """What shows the help for the verb that an error of typer's comes from."""
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context else 'edgec'} --help"
