"""Check this machine and the installed packages. Each line says ok or missing, with the command that fixes it; a line of
three dots names the check in progress."""

import argparse
import os
import platform
import shutil
import sys
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from loratune.system.machine import usable_cores

_NEEDED = {name: name for name in ("torch", "transformers", "peft", "accelerate", "datasets", "optuna", "cmaes", "matplotlib")}
if platform.machine() != "aarch64":  # where it has no wheel
    _NEEDED["PyNomadBBO"] = "PyNomad"  # package: module
_OPTIONAL = {"nni": ("nni", "nni"), "bitsandbytes": ("bitsandbytes", "4bit")}  # package: (module, extra)


class Report:
    """Prints the checks as they go, and counts what is missing."""

    def __init__(self) -> None:
        self.missing = 0
        self.checks: list[dict[str, Any]] = []

    def began(self, what: str, text: str) -> None:
        """Announce a check, which may take a minute on a machine that reads the libraries for the first time."""
        self._print("...", what, text, over=True)

    def result(self, what: str, ok: bool, text: str, fix: str = "", *, needed: bool = True) -> None:
        """`fix` is the command that helps, if any."""
        word = "ok" if ok else "missing" if needed else "optional"
        self.checks.append({"check": what, "state": word, "text": text, "fix": fix if not ok else ""})
        self._print(word, what, text if ok or not fix else f"{text}; fix with: {fix}")
        self.missing += needed and not ok

    @staticmethod
    def _print(word: str, what: str, text: str, *, over: bool = False) -> None:
        """A line, shown at once; on a terminal the next one is written over it when `over`."""
        line, terminal = f"{word:<9}{what:<14} {text}", sys.stdout.isatty()
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and over else "\n", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")
    report = Report()
    for check in (python, packages, machine, devices, lora_step, *([nomad] if "PyNomadBBO" in _NEEDED else [])):
        check(report)
    found = f"{report.missing} missing." if report.missing else "Everything that loratune needs is installed."
    print(f"\n{found}{'' if report.missing else ' First try: loratune run --demo'}")
    args.facts |= {"missing": report.missing, "checks": report.checks}
    if report.missing:
        args.facts["error"] = {"kind": "MissingExtraError", "message": f"{found} Run the `fix` of each check whose state is missing."}
    return 1 if report.missing else 0


def python(report: Report) -> None:
    report.result("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")


def packages(report: Report) -> None:
    for name, module in _NEEDED.items():
        _package(report, name, module, f"pip install --upgrade {name}")
    for name, (module, extra) in _OPTIONAL.items():
        _package(report, name, module, f"pip install 'loratune[{extra}]'", needed=False)


def machine(report: Report) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    writable = os.access(Path.cwd(), os.W_OK)
    report.result("processor", True, f"{usable_cores()} cores, {memory:.0f} GiB of memory")
    text = f"{free:.0f} GiB free here{'' if writable else ', but this folder is read-only'}"
    report.result("disk", writable and free > 1, text, "cd elsewhere")


def devices(report: Report) -> None:
    report.began("gpu", "asking torch for GPUs")
    try:
        from loratune.finetune.selfcheck import gpus
    except Exception:
        return  # reported by `packages`
    found = gpus()
    if not found:
        gpu = any(Path("/dev").glob("nvidia[0-9]*"))
        text = "a GPU is here, but this torch cannot use it" if gpu else "no GPU; trials run on the CPU"
        report.result("gpu", not gpu, text, "install a CUDA build of torch, see https://pytorch.org/get-started", needed=False)
    for index, text in enumerate(found):
        report.result(f"gpu {index}", True, text)


def lora_step(report: Report) -> None:
    """One LoRA step of a random tiny Llama, on the device that trials would use."""
    fix = "pip install --upgrade torch transformers peft"
    report.began("LoRA step", "training a tiny model")
    try:
        from loratune.finetune.selfcheck import one_step

        device, before, after = one_step()
    except Exception as error:
        report.result("LoRA step", False, f"{type(error).__name__}: {error}", fix)
        return
    report.result("LoRA step", after < before, f"runs on {device}" if after < before else "the loss did not fall", fix)


def nomad(report: Report) -> None:
    """Three proposals of NOMAD for a parabola."""
    report.began("NOMAD", "asking for three proposals")
    try:
        import optuna

        from loratune.samplers import NomadSampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=NomadSampler(search_space={"x": optuna.distributions.FloatDistribution(-1, 1)}, seed=0))
        study.optimize(lambda trial: (trial.suggest_float("x", -1, 1) - 0.3) ** 2, n_trials=3)
    except Exception as error:
        text, fix = f"does not answer: {type(error).__name__}: {error}", "pip install --force-reinstall PyNomadBBO"
        report.result("NOMAD", False, text, fix)
        return
    report.result("NOMAD", True, "answers")


def _package(report: Report, name: str, module: str, fix: str, *, needed: bool = True) -> None:
    report.began(name, "importing")
    try:
        import_module(module)
        report.result(name, True, metadata.version(name), needed=needed)
    except Exception as error:  # not there, or a broken build: whatever its import raises
        absent = isinstance(error, ModuleNotFoundError) and error.name == module
        how = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        report.result(name, False, "not installed" if absent else f"cannot be imported: {how}", fix, needed=needed)
