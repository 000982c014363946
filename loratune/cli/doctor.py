"""Check this machine and what is installed. Each line says ok or missing, with the command that mends it."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from loratune.environment import usable_cores

_NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets", "optuna", "cmaes", "matplotlib")
_OPTIONAL = {"nni": ("nni", "nni"), "bitsandbytes": ("bitsandbytes", "4bit")}  # package: (module, extra)


@dataclass(frozen=True)
class Line:
    """One finding. `mend` is the command that helps, if any."""

    what: str
    ok: bool
    text: str
    mend: str = ""
    needed: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    checks: list[Callable[[], list[Line]]] = [python, packages, extras, machine, devices, lora_step, nomad]
    warnings.simplefilter("ignore")
    failed = 0
    for check in checks:
        for line in check():
            word = "ok" if line.ok else "missing" if line.needed else "optional"
            print(f"{word:<9}{line.what:<14} {line.text}{f'; mend with: {line.mend}' if line.mend and not line.ok else ''}", flush=True)
            failed += line.needed and not line.ok
    print(f"\n{failed} missing." if failed else "\nAll that loratune needs is here. First try: loratune run --demo")
    return 1 if failed else 0


def python() -> list[Line]:
    version = sys.version.split()[0]
    return [Line("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")]


def packages() -> list[Line]:
    return [_package(name, name, f"pip install --upgrade {name}") for name in _NEEDED] + [
        _package("PyNomadBBO", "PyNomad", "pip install --upgrade PyNomadBBO")
    ]


def extras() -> list[Line]:
    return [_package(name, module, f"pip install 'loratune[{extra}]'", needed=False) for name, (module, extra) in _OPTIONAL.items()]


def machine() -> list[Line]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    writable = os.access(Path.cwd(), os.W_OK)
    return [
        Line("processor", True, f"{usable_cores()} cores, {memory:.0f} GiB of memory"),
        Line(
            "disk", writable and free > 1, f"{free:.0f} GiB free here{'' if writable else ', but this folder is read-only'}", "cd elsewhere"
        ),
    ]


def devices() -> list[Line]:
    try:
        from loratune.finetune.selfcheck import gpus
    except Exception:
        return []  # told by `packages`
    found = gpus()
    if not found:
        gpu = any(Path("/dev").glob("nvidia[0-9]*"))
        text = "a GPU is here, but this torch cannot use it" if gpu else "no GPU; trials run on the CPU"
        return [Line("gpu", not gpu, text, "install a CUDA build of torch, see https://pytorch.org/get-started", needed=False)]
    return [Line(f"gpu {index}", True, text) for index, text in enumerate(found)]


def lora_step() -> list[Line]:
    """One LoRA step of a random tiny Llama, on the device that trials would use."""
    mend = "pip install --upgrade torch transformers peft"
    try:
        from loratune.finetune.selfcheck import one_step

        device, before, after = one_step()
    except Exception as error:
        return [Line("LoRA step", False, f"{type(error).__name__}: {error}", mend)]
    ok = after < before
    return [Line("LoRA step", ok, f"runs on {device}" if ok else "the loss did not fall", mend)]


def nomad() -> list[Line]:
    """Three proposals of NOMAD for a parabola."""
    mend = "pip install --force-reinstall PyNomadBBO"
    try:
        import optuna

        from loratune.samplers import NomadSampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=NomadSampler(search_space={"x": optuna.distributions.FloatDistribution(-1, 1)}, seed=0))
        study.optimize(lambda trial: (trial.suggest_float("x", -1, 1) - 0.3) ** 2, n_trials=3)
    except Exception as error:
        return [Line("NOMAD", False, f"does not answer: {type(error).__name__}: {error}", mend)]
    return [Line("NOMAD", True, "answers")]


def _package(name: str, module: str, mend: str, *, needed: bool = True) -> Line:
    try:
        import_module(module)
        return Line(name, True, metadata.version(name), needed=needed)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        return Line(name, False, "not installed" if absent else f"cannot be imported: {error}", mend, needed)
    except Exception as error:  # a broken build: whatever its import raises
        return Line(name, False, f"cannot be imported: {type(error).__name__}: {error}", mend, needed)
