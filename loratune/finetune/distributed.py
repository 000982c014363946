"""Several processes for one trial, as torchrun starts them: one per device, one global batch."""

import datetime
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


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


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Give each process its share of the weights of each layer of a frozen model, which is on the CPU; the rest it holds whole.

    FSDP2: a layer's weights are gathered when it runs, forward and backward, and every process must run it as often as the
    others. Embeddings, the last norm and the head are not shared out: tied, they would belong to two groups.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))
    mesh = init_device_mesh(device.type, (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = {id(tensor) for layer in layers for tensor in [*layer.parameters(), *layer.buffers()]}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, in one reduction."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    together = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for g, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def most(count: int, device: torch.device) -> int:
    """The largest of all processes' counts."""
    box = torch.tensor(count, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
