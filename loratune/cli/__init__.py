"""The command line: `loratune COMMAND ...`. Each command is a file of this folder, imported only when it is chosen.

A command's module has `add_arguments(parser)` and `main(args) -> exit code`, and imports what is heavy
inside functions: help and `status` must be there at once.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from loratune.cli.as_json import INTERRUPTION, Answer, add_json
from loratune.cli.interrupt import INTERRUPTED, terminable
from loratune.cli.parser import Parser, UsageError
from loratune.errors import LoratuneError, StorageError
from loratune.system.files import working_folder
from loratune.system.masking import masked
from loratune.system.names import nearest

COMMANDS = {
    "run": "search for the best hyperparameters, or continue a study",
    "recommend": "recommend hyperparameters in a second, without training",
    "status": "show what a study is doing, and its best trials so far",
    "evaluate": "score the best adapters, the default and the bare model on benchmarks",
    "select": "race the best trials with fresh seeds, and choose the adapter to ship",
    "report": "write the report of one study, or the comparison of several",
    "dashboard": "open optuna-dashboard on a study",
    "compare": "let people, or a model, judge blindly which of two models answers better",
    "export": "copy a trial's adapter, the merged model, or the settings for another tool",
    "import": "make a study of a recipe of Axolotl, LLaMA-Factory or TRL",
    "init": "write a commented study description to start from",
    "schema": "print the JSON Schema of a study description, for editors",
    "doctor": "check this machine and the installed packages",
}
_MODULES = {"import": "import_recipe"}  # a word of Python's
_BUG = 70  # EX_SOFTWARE of sysexits.h
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # its state, no fault of ours


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, the error's, 2 for a wrong command line, 130 when interrupted, 70 for a bug."""
    argv = list(sys.argv[1:] if argv is None else argv)
    answer = Answer(argv)
    with terminable(answer):
        code = _ended(argv, answer)
        try:
            answer.give()
        except OSError as error:  # the output's disk is full, or the reader went away
            _drop_output()
            if not isinstance(error, BrokenPipeError):
                print(f"loratune: {error.strerror}: the output", file=sys.stderr)
                return code or StorageError.exit_code
    return code


def _ended(argv: list[str], answer: Answer) -> int:
    """Run the command; however it ends, gives the exit code, and what went wrong has been told."""
    try:
        code = _run(argv, answer)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _failed(answer, "UsageError", error.message, 2)
    except SystemExit as error:  # argparse has shown the help, or a library ended the program
        if error.code in (None, 0):
            answer.wanted = False
            return 0
        answer.failed("SystemExit", f"ended with {error.code}")
        return error.code if isinstance(error.code, int) else 2
    except LoratuneError as error:
        return _failed(answer, type(error).__name__, str(error), error.exit_code)
    except BrokenPipeError:  # the reader went away, as `head` does
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in _MACHINE:
            return _bug(answer, error)
        if not answer.wanted:  # whose standard output got nothing yet
            _drop_output()
        text = f"{error.strerror}: {error.filename or 'the output'}. Nothing computed is lost; the same command continues."
        return _failed(answer, "StorageError", text, StorageError.exit_code)
    except KeyboardInterrupt:
        return _failed(answer, INTERRUPTION, "interrupted; the same command goes on, or does it anew", INTERRUPTED)
    except Exception as error:
        return _bug(answer, error)


def _failed(answer: Answer, kind: str, message: str, code: int) -> int:
    answer.failed(kind, message)
    print(f"loratune: {masked(message)}", file=sys.stderr)
    return code


def _bug(answer: Answer, error: Exception) -> int:
    print(masked(traceback.format_exc()), file=sys.stderr)
    answer.failed("Bug", f"{type(error).__name__}: {error}. This is a bug of loratune, and the traceback is on standard error.")
    print("loratune: this is a bug. Please report it with the text above and the output of `loratune doctor`.", file=sys.stderr)
    return _BUG


def _drop_output() -> None:
    """Else Python fails once more on the output that it could not print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"loratune.cli.{_MODULES.get(command, command)}")


def _run(argv: list[str], answer: Answer) -> int:
    if argv and argv[0] in COMMANDS:
        command = module_of(argv[0])
        parser = Parser(prog=f"loratune {argv[0]}", description=command.__doc__, fields=argv[0] in ("run", "recommend"))
        command.add_arguments(parser)
        add_json(parser)
        args = parser.parse_args(argv[1:])
        args.command_line = ["loratune", *argv]
        if argv[0] != "status":  # which reads what it is given, wherever it stands
            working_folder()
        return answer.run(command.main, args)
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="loratune",
        usage="loratune COMMAND ...",
        description="Find the LoRA hyperparameters for your model, your instruction data and your GPU budget.",
        epilog=f"commands:\n{lines}\n\nSee `loratune COMMAND --help` for details. First try: loratune run --demo",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from importlib.metadata import version

        answer.facts["version"] = version("loratune")
        if not answer.wanted:
            print(f"loratune {answer.facts['version']}")
        return 0
    if rest:
        parser.error(f"no command {rest[0]!r}{nearest(rest[0], COMMANDS) or '; the commands: ' + ', '.join(COMMANDS)}")
    answer.wanted = False
    parser.print_help()
    return 0
