"""A run's checkpoint: one file, written aside and renamed, so that it is whole or absent.

    <run folder>/checkpoint-0000120.safetensors
        adapter/<parameter>                                 the weights after step 120
        exp_avg/<parameter>, exp_avg_sq/<parameter>         AdamW's moments; absent once the run is complete
        best/<parameter>                                    the weights at the lowest point of the curve, with keep: best
        metadata: {"run": what was being trained, "facts": counters and curve so far}, JSON each

With the order of examples, the schedule and dropout pure functions of the step, that is all a run needs to go
on bit for bit. A newer checkpoint replaces the older ones.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from loratune.errors import StorageError
from loratune.system.files import writer, written_elsewhere

_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    run: str  # identifies what was trained; a checkpoint of something else is not used
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def has_moments(self) -> bool:
        return any(name.startswith("exp_avg/") for name in self.tensors)


def capture(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, best: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors: the adapter's weights and, with an optimiser, its moments (zero before its first step).

    best: the weights that are kept whatever comes, by the same names. One file holds both, so that a kill cannot part them.
    """
    tensors = {f"adapter/{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in (best or {}).items()}
    if optimizer is not None:
        for name, p in parameters.items():
            for moment in _MOMENTS:
                found = optimizer.state[p].get(moment)
                tensors[f"{moment}/{name}"] = found if found is not None else torch.zeros_like(p, device="cpu")  # wants no room on a GPU
    return tensors


def restore(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
    """Put a checkpoint's tensors back in place."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(checkpoint.tensors[f"adapter/{name}"])
    if optimizer is None or not checkpoint.has_moments:
        return
    names = {id(p): name for name, p in parameters.items()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {"step": torch.tensor(float(checkpoint.step)), **{m: checkpoint.tensors[f"{m}/{name}"] for m in _MOMENTS}}
        for index, name in enumerate(ordered)
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def kept_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What `capture` was given as `best`; empty of a checkpoint without."""
    return {name.removeprefix("best/"): tensor for name, tensor in checkpoint.tensors.items() if name.startswith("best/")}


def save_checkpoint(folder: Path, checkpoint: Checkpoint, attempt: int = 1) -> Path:
    """Write the checkpoint, then remove what it supersedes. Raises StorageError.

    attempt: the segment's, of which an older one may still be writing on another machine.
    """
    path = folder / f"checkpoint-{checkpoint.step:07d}.safetensors"
    aside = folder / f".{path.name}.{writer()}.{attempt}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, aside, metadata={"run": checkpoint.run, "facts": json.dumps(checkpoint.facts)})
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error}. The checkpoint before it is kept; free the disk, then run the same command."
        ) from error
    remove_leftovers(folder, keep=path)
    return path


def newest_checkpoint(folder: Path, *, run: str, at_most: int, moments_below: int) -> Checkpoint | None:
    """The newest readable checkpoint of `run` up to step `at_most`; below step `moments_below` it must hold moments."""
    for step, path in sorted(_found(folder), reverse=True):
        if step > at_most:
            continue
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("run") != run:
                    continue
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = Checkpoint(step=step, run=run, tensors=tensors, facts=json.loads(metadata["facts"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            continue  # damaged on the disk: an older one, or step 0, gives the same result later
        if found.has_moments or step >= moments_below:
            return found
    return None


def remove_leftovers(folder: Path, keep: Path | None = None) -> None:
    """Remove what killed writers of this machine left behind and, given `keep`, every other checkpoint."""
    for path in folder.glob(".checkpoint-*"):
        if not written_elsewhere(path):
            path.unlink(missing_ok=True)
    if keep is not None:
        for _, path in _found(folder):
            if path != keep:
                path.unlink(missing_ok=True)


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    names = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in names if match]
