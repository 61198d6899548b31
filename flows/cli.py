"""The `score` command: its entry point and exit codes; see flows/commands/app.py for what it does.

Exit codes: 0 done or already published; 1 failed; 2 wrong use or configuration; 3 a guard stopped
publication; 75 interrupted, or a store is full or out of reach: resumable by the same command.

Light: the process of a lane imports its parent's main module too, and the first of them begins
here, before the commands are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from engines.errors import EngineError, EngineNotFoundError, ModelError
from pipeline import start_up
from pipeline.errors import ConfigError, GuardError, Interrupted, PipelineError
from pipeline.store_errors import is_outage

EXIT_INTERRUPTED = 75
TYPERS_CTRL_C = 130
"""What typer returns for a KeyboardInterrupt that meets it, as if a command had."""
CTRL_C = "SIGINT received; nothing is half done. Run the same command again to go on."
LANE_COMMANDS, NO_LANES = {"run", "requeue", "backfill"}, {"--help", "--dry-run"}
"""Commands that score, most likely; and what makes that unlikely."""


def main() -> NoReturn:
    """Console entry point."""
    start_up.begin()
    try:
        with lane_ahead(sys.argv[1:]):
            run_command()
    except KeyboardInterrupt:  # before there was a command
        if "--json" in sys.argv:
            import json

            sys.stdout.write(json.dumps(failure(EXIT_INTERRUPTED, CTRL_C)) + "\n")
        sys.stderr.write(f"interrupted: {CTRL_C}\n")
        start_up.leave(EXIT_INTERRUPTED)
    except SystemExit as stop:
        start_up.leave(stop.code if isinstance(stop.code, int) else 0)


def lane_ahead(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Meanwhile a process for a lane imports what it needs, if the command will want one."""
    if not LANE_COMMANDS.intersection(arguments[:1]) or NO_LANES.intersection(arguments):
        return nullcontext()
    from pipeline.lane_spawn import process_ahead

    return process_ahead()


def run_command() -> NoReturn:
    """Run the command of `sys.argv` and turn errors into one sentence and an exit code."""
    from flows.commands.app import app

    try:
        code = app(standalone_mode=False)
        if code == TYPERS_CTRL_C:  # in a command that does not look out for one, or not yet
            raise Interrupted(CTRL_C)
        sys.exit(code)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    from rich.text import Text

    from engines.masking import masked
    from flows.commands.terminal import errors, print_json
    from pipeline.report_words import plain

    usage = getattr(error, "format_message", None)  # click's errors of usage
    if usage is not None and not usage():  # without arguments, and the help is printed
        sys.exit(2)
    if usage is not None:
        error = ConfigError(f"{usage().rstrip('.')}. See `score --help`.")
    is_ours = isinstance(error, (PipelineError, EngineError, OSError))
    if not is_ours and not type(error).__module__.startswith("botocore"):
        raise error
    code, said = exit_code_of(error), plain(masked(str(error)))
    if "--json" in sys.argv:
        which = {"guard": error.guard} if isinstance(error, GuardError) else {}
        print_json(failure(code, said, **which))
    label = "interrupted" if code == EXIT_INTERRUPTED else "error"
    errors.print(Text.assemble((f"{label}: ", "bold red"), said), soft_wrap=True)
    sys.exit(code)


def failure(code: int, said: str, **which: str) -> dict[str, str | int]:
    """What `--json` prints of a command that failed; `which` says more of some errors."""
    status = "interrupted" if code == EXIT_INTERRUPTED else "failed"
    return {"status": status, "exit_code": code, **which, "error": said}


def exit_code_of(error: Exception) -> int:
    """The exit code for an error that the product raises on purpose."""
    if isinstance(error, PipelineError):
        return error.exit_code
    if is_outage(error):  # a full disk under the cache of engines, say
        return EXIT_INTERRUPTED
    return 2 if isinstance(error, (ModelError, EngineNotFoundError)) else 1


if __name__ == "__main__":
    main()
