"""The deltas of one layer, of four adapters side by side: on any device, in any precision, by any backend."""

import torch

from loratune.finetune import compiled, dropout
from loratune.finetune.packed.delta import add_deltas
from loratune.finetune.packed.products import Backend, LayerDelta, PassRows

ENDS, RANKS, RATES, KEYS, WIDTHS = [0, 33, 150, 151, 256], [4, 16, 8, 12], [0.0, 0.1, 0.3, 0.05], [5, -6, 7, 8], (64, 96)


def layer_deltas(device: torch.device, dtype: torch.dtype, backend: Backend) -> list[torch.Tensor]:
    """y, the gradient of x, then those of each A and B. The numbers put in are the same for all, to `dtype`'s rounding."""
    generator, (wide, out) = torch.Generator().manual_seed(0), WIDTHS

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device, dtype)

    x, y = numbers(ENDS[-1], wide).requires_grad_(), numbers(ENDS[-1], out)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [
        LayerDelta(
            layer="q",
            number=k,
            start=ENDS[k],
            stop=ENDS[k + 1],
            a=numbers(rank, wide),
            b=numbers(out, rank),
            grad_a=torch.zeros(rank, wide, dtype=master, device=device),
            grad_b=torch.zeros(out, rank, dtype=master, device=device),
            scale=1.7,
            p=RATES[k],
            key=KEYS[k],
        )
        for k, rank in enumerate(RANKS)
    ]
    count = torch.arange(ENDS[-1], device=device)
    rows = PassRows(
        hashes=dropout.row_hashes(count // 9, count % 9),
        whose=torch.arange(len(RANKS)).repeat_interleave(torch.tensor(ENDS).diff()).to(device),
        thresholds=torch.tensor([dropout.threshold(p) for p in RATES], dtype=torch.int32, device=device),
        keys={"q": torch.tensor(KEYS, dtype=torch.int32, device=device)} if compiled.on_gpu(x) else {},
    )
    got = add_deltas(x, y, parts, rows, torch.zeros((), device=device, requires_grad=True), backend)
    got.backward(got.detach() * 0.1 + 1)
    grads = [grad for part in parts for grad in (part.grad_a, part.grad_b) if grad is not None]
    assert x.grad is not None
    return [one.detach().cpu().double() for one in (got, x.grad, *grads)]


def worst(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of any."""
    return max(float((one - two).norm() / two.norm()) for one, two in zip(got, expected, strict=True))
