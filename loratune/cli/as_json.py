"""`--json`, of every command: one JSON object on standard output, for programs and agents. All other text goes to standard error.

A command puts its results into `args.facts`; docs/reference/json.md lists them. Where the command fails, the object is
{"error": {"kind": "SpecError", "message": ...}}, beside what was found before; the exit code is the same as without --json.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune.errors import LoratuneError
from loratune.system.masking import masked


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object; all other text goes to standard error")


def run(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The command, with or without `args.json`. Returns its exit code; raises what the command raises, but for errors told as JSON."""
    args.facts = {}
    if not args.json:
        return command(args)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            code = command(args)
        except LoratuneError as error:
            code, text = error.exit_code, masked(str(error))
            args.facts["error"] = {"kind": type(error).__name__, "message": text}
            print(f"loratune: {text}")
    print(json.dumps(_plain(args.facts), indent=1))
    return code


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, also as `Json.to_plain` spells them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value in ("nan", "inf", "-inf") or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return str(value) if isinstance(value, Path) else value
