"""Check this machine and the installed packages. Each line says ok or missing, with the command that fixes it; a line of
three dots names the check in progress."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from loratune.system.machine import usable_cores

_NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets", "optuna", "cmaes", "matplotlib")
_OPTIONAL = {"nni": ("nni", "nni"), "bitsandbytes": ("bitsandbytes", "4bit")}  # package: (module, extra)


@dataclass(frozen=True)
class CheckResult:
    """The result of a check. `fix` is the command that helps, if any."""

    what: str
    ok: bool
    text: str
    fix: str = ""
    needed: bool = True


@dataclass(frozen=True)
class CheckBegan:
    """Announces a check, which may take a minute on a machine that reads the libraries for the first time."""

    what: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    failed = 0
    for check in (python, packages, extras, machine, devices, lora_step, nomad):
        for line in check():
            if isinstance(line, CheckBegan):
                _print_line("...", line.what, line.text, over=True)
                continue
            _print_line(
                "ok" if line.ok else "missing" if line.needed else "optional", line.what, line.text, line.fix if not line.ok else ""
            )
            failed += line.needed and not line.ok
    print(f"\n{failed} missing." if failed else "\nEverything that loratune needs is installed. First try: loratune run --demo")
    return 1 if failed else 0


def _print_line(word: str, what: str, text: str, fix: str = "", *, over: bool = False) -> None:
    """A line, shown at once; on a terminal the next one is written over it when `over`."""
    line = f"{word:<9}{what:<14} {text}{f'; fix with: {fix}' if fix else ''}"
    terminal = sys.stdout.isatty()
    print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and over else "\n", flush=True)


def python() -> list[CheckResult]:
    version = sys.version.split()[0]
    return [CheckResult("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")]


def packages() -> Iterator[CheckResult | CheckBegan]:
    for name in _NEEDED:
        yield from _package(name, name, f"pip install --upgrade {name}")
    yield from _package("PyNomadBBO", "PyNomad", "pip install --upgrade PyNomadBBO")


def extras() -> Iterator[CheckResult | CheckBegan]:
    for name, (module, extra) in _OPTIONAL.items():
        yield from _package(name, module, f"pip install 'loratune[{extra}]'", needed=False)


def machine() -> list[CheckResult]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    writable = os.access(Path.cwd(), os.W_OK)
    return [
        CheckResult("processor", True, f"{usable_cores()} cores, {memory:.0f} GiB of memory"),
        CheckResult(
            "disk", writable and free > 1, f"{free:.0f} GiB free here{'' if writable else ', but this folder is read-only'}", "cd elsewhere"
        ),
    ]


def devices() -> Iterator[CheckResult | CheckBegan]:
    yield CheckBegan("gpu", "asking torch for GPUs")
    try:
        from loratune.finetune.selfcheck import gpus
    except Exception:
        return  # reported by `packages`
    found = gpus()
    if not found:
        gpu = any(Path("/dev").glob("nvidia[0-9]*"))
        text = "a GPU is here, but this torch cannot use it" if gpu else "no GPU; trials run on the CPU"
        yield CheckResult("gpu", not gpu, text, "install a CUDA build of torch, see https://pytorch.org/get-started", needed=False)
    for index, text in enumerate(found):
        yield CheckResult(f"gpu {index}", True, text)


def lora_step() -> Iterator[CheckResult | CheckBegan]:
    """One LoRA step of a random tiny Llama, on the device that trials would use."""
    fix = "pip install --upgrade torch transformers peft"
    yield CheckBegan("LoRA step", "training a tiny model")
    try:
        from loratune.finetune.selfcheck import one_step

        device, before, after = one_step()
    except Exception as error:
        yield CheckResult("LoRA step", False, f"{type(error).__name__}: {error}", fix)
        return
    ok = after < before
    yield CheckResult("LoRA step", ok, f"runs on {device}" if ok else "the loss did not fall", fix)


def nomad() -> Iterator[CheckResult | CheckBegan]:
    """Three proposals of NOMAD for a parabola."""
    fix = "pip install --force-reinstall PyNomadBBO"
    yield CheckBegan("NOMAD", "asking for three proposals")
    try:
        import optuna

        from loratune.samplers import NomadSampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=NomadSampler(search_space={"x": optuna.distributions.FloatDistribution(-1, 1)}, seed=0))
        study.optimize(lambda trial: (trial.suggest_float("x", -1, 1) - 0.3) ** 2, n_trials=3)
    except Exception as error:
        yield CheckResult("NOMAD", False, f"does not answer: {type(error).__name__}: {error}", fix)
        return
    yield CheckResult("NOMAD", True, "answers")


def _package(name: str, module: str, fix: str, *, needed: bool = True) -> Iterator[CheckResult | CheckBegan]:
    yield CheckBegan(name, "importing")
    try:
        import_module(module)
        yield CheckResult(name, True, metadata.version(name), needed=needed)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        yield CheckResult(name, False, "not installed" if absent else f"cannot be imported: {error}", fix, needed)
    except Exception as error:  # a broken build: whatever its import raises
        yield CheckResult(name, False, f"cannot be imported: {type(error).__name__}: {error}", fix, needed)
