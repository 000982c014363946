"""Argument parsing: argparse, with the nearest name for a misspelt flag, and any field of the study as a flag."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from loratune.system.names import close_names


class UsageError(SystemExit):
    """A command line that cannot be read; ends the program with exit code 2, as argparse does."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Override(argparse.Action):
    """Collects (dotted field, YAML text) in `overrides`, in the order of the command line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if namespace.overrides is None:
            namespace.overrides = []
        namespace.overrides.append((str(option).removeprefix("--").replace("-", "_"), values))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses abbreviations and names the nearest flag.

    With `fields`, flags named like a field of the study's description (`--training.epochs 2`,
    `--search_space.lora_r '[4, 8]'`) are collected in `args.overrides`; the description itself checks them.
    """

    def __init__(self, *, fields: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._fields = fields

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if self._fields and not {"-h", "--help"} & set(args):  # help needs no fields, and they need pydantic
            self._accept_fields(args)
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            given = unknown[0].partition("=")[0]
            self._refuse(given, close_names(given, self._flags))
        return known

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{self.prog} --help`.")

    def _accept_fields(self, args: Sequence[str]) -> None:
        """Make an option of every flag among `args` that begins with a field's or section's name."""
        for flag in dict.fromkeys(arg.partition("=")[0] for arg in args if arg.startswith("--") and arg != "--"):
            if flag in self._option_string_actions:
                continue
            from loratune.spec import StudySpec
            from loratune.spec.loading import ROOT_ALIASES

            root = flag.removeprefix("--").replace("-", "_").partition(".")[0]
            if root in ROOT_ALIASES or root in StudySpec.model_fields:
                self.add_argument(flag, action=Override, dest="overrides", default=None, help=argparse.SUPPRESS)
            else:
                fields = [f"--{name}" for name in field_names()]
                same_end = [name for name in fields if name.rpartition(".")[2] == flag.replace("-", "_").strip("_")]
                self._refuse(flag, same_end or close_names(flag, [*self._flags, *fields]))

    @property
    def _flags(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def _refuse(self, flag: str, near: Sequence[str]) -> NoReturn:
        self.error(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))


def field_names() -> list[str]:
    """Every field of the study's description by its dotted name, `training.epochs`."""
    from pydantic import BaseModel

    from loratune.spec import StudySpec
    from loratune.spec.hyperparameters import NAMES

    names = []
    for section, field in StudySpec.model_fields.items():
        kind = field.annotation
        if section == "search_space":
            names += [f"{section}.{name}" for name in NAMES]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [f"{section}.{name}" for name in kind.model_fields]
        else:
            names.append(section)
    return names


def add_no_browser(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--no-browser", action="store_true", help="print the page's address without opening it")


def open_browser(args: argparse.Namespace, address: str) -> None:
    """Open a page where there is a screen, unless --no-browser."""
    if not args.no_browser and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import webbrowser

        webbrowser.open(address)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The user's consent to code that comes with the model. A study's folder, which may come from somebody else, cannot give it."""
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model, where the study asks for it")
