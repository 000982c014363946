"""Several processes for one trial, as torchrun starts them: one per device, one global batch."""

import datetime
import os

import torch
import torch.distributed as dist


def join_group(device: torch.device) -> tuple[int, int]:
    """Join the group that torchrun's environment describes, if any; returns this process's rank and their number."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Words travel over gloo, whose waiting costs nothing: between trials processes may wait for hours.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    return dist.get_rank(), world


def broadcast(text: str | None) -> str | None:
    """Process 0's text, in every process."""
    if not dist.is_initialized():
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def agree(flag: bool) -> bool:
    """Whether process 0 says so."""
    return broadcast("yes" if flag else None) is not None
