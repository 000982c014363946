"""The keyed mask: a pure function with the statistics of independent coins."""

import pytest
import torch

from loratune.errors import ModelError
from loratune.finetune.dropout import DropoutKey, KeyedDropout, keep_mask


def mask(
    *, seed: int = 0, step: int = 0, module: str = "a", slots: int = 40, length: int = 50, features: int = 64, p: float = 0.1
) -> torch.Tensor:
    key = DropoutKey(seed)
    key.set(step, torch.arange(slots).view(-1, 1), torch.arange(length))
    return keep_mask(key.rows, key.of(module), features, p, torch.float32) == 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_rate(p: float) -> None:
    drop = mask(p=p)
    deviation = (drop.double().mean() - p) / (p * (1 - p) / drop.numel()) ** 0.5
    assert abs(deviation) < 4


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"module": "b"}])
def test_independent_across_seed_step_and_module(other: dict[str, object]) -> None:
    a, b = mask(p=0.5).double() - 0.5, mask(p=0.5, **other).double() - 0.5  # type: ignore[arg-type]
    assert abs((a * b).mean() * 4) * a.numel() ** 0.5 < 4.5


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 4, 8, 16, 32])
def test_no_correlation_along_a_coordinate(dimension: int, shift: int) -> None:
    centred = mask(p=0.5).double() - 0.5
    size = centred.shape[dimension] - shift
    product = centred.narrow(dimension, 0, size) * centred.narrow(dimension, shift, size)
    assert abs(product.mean() * 4) * product.numel() ** 0.5 < 4.5


def test_chi_square_of_octets() -> None:
    """Eight neighbouring features, positions or steps as the bits of a byte: all 256 equally frequent."""
    bits = mask(p=0.5, features=256, slots=64, length=64)
    stacks = [bits.unflatten(2, (-1, 8)), bits.unflatten(1, (-1, 8)).movedim(2, -1), bits.unflatten(0, (-1, 8)).movedim(1, -1)]
    steps = torch.stack([mask(p=0.5, step=step, features=256, slots=64, length=8) for step in range(8)], dim=-1)
    for stack in [*stacks, steps]:
        codes = (stack.long() * (2 ** torch.arange(8))).sum(-1).flatten()
        counts = torch.bincount(codes, minlength=256).double()
        expected = len(codes) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


def test_rows_and_columns_vary_as_coins_do() -> None:
    """Counts per row and per column are binomial: neither patterned nor too even."""
    drop = mask(p=0.3, slots=30, length=40, features=200).flatten(0, 1).double()
    for dimension in (0, 1):
        n = drop.shape[dimension]
        counts = drop.sum(dimension)
        ratio = counts.var() / (n * 0.3 * 0.7)
        assert abs(ratio - 1) < 5 * (2 / len(counts)) ** 0.5


def test_pinned_values() -> None:
    """The very mask, so that an engine, a device or a torch that computes another one is found out."""
    drop = mask(seed=3, step=7, module="model.layers.0.self_attn.q_proj", slots=2, length=2, features=16, p=0.5)
    codes = (drop.long() * 2 ** torch.arange(16)).sum(-1).flatten().tolist()
    assert codes == reference_codes(seed=3, step=7, module="model.layers.0.self_attn.q_proj")


def reference_codes(*, seed: int, step: int, module: str) -> list[int]:
    """The docstring of dropout.py in Python integers."""
    import hashlib

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = int.from_bytes(hashlib.sha256(f"dropout/{seed}/{step}/{module}".encode()).digest()[:4], "little")
    codes = []
    for slot in range(2):
        for position in range(2):
            row = mix(mix(mix(slot) ^ position) ^ key)
            hashes = [mix((row + d * 0x9E3779B9) % 2**32) for d in range(16)]
            codes.append(sum((h ^ 0x80000000 < 0x80000000) << d for d, h in enumerate(hashes)))
    return codes


def test_independent_of_how_the_batch_is_cut_and_padded() -> None:
    x = torch.randn(4, 9, 16)
    key = DropoutKey(0)
    module = KeyedDropout(0.4, "m", key)
    key.set(5, torch.arange(4).view(-1, 1), torch.arange(9))
    whole = module(x)
    key.set(5, torch.tensor([[3], [1]]), torch.arange(6))
    assert torch.equal(module(x[[3, 1], :6]), whole[[3, 1], :6])
    key.set(5, torch.tensor([[3] * 6 + [1] * 4]), torch.tensor([[*range(6), *range(4)]]))  # both in one flat row
    flat = torch.cat([x[3, :6], x[1, :4]])
    assert torch.equal(module(flat[None])[0], torch.cat([whole[3, :6], whole[1, :4]]))
    assert torch.equal(module(flat), torch.cat([whole[3, :6], whole[1, :4]]))


def test_limits() -> None:
    key = DropoutKey(0)
    key.set(0, torch.zeros(1, 1), torch.arange(3))
    x = torch.tensor([[[1.0], [float("inf")], [-2.0]]], requires_grad=True)
    assert KeyedDropout(0.0, "m", key)(x) is x
    silent = KeyedDropout(1.0, "m", key)(x)
    assert torch.equal(silent, torch.zeros_like(x))
    module = KeyedDropout(0.5, "m", key)
    assert module.eval()(x) is x
    assert not module.train()(x).isnan().any()


def test_unbiased() -> None:
    key = DropoutKey(0)
    key.set(0, torch.arange(50).view(-1, 1), torch.arange(50))
    assert KeyedDropout(0.25, "m", key)(torch.ones(50, 50, 40)).mean().item() == pytest.approx(1, abs=0.01)


def test_layers_that_do_not_see_the_tokens_are_refused() -> None:
    key = DropoutKey(0)
    key.set(0, torch.arange(2).view(-1, 1), torch.arange(5))
    with pytest.raises(ModelError, match=r"experts\.3.*lora_dropout to 0"):
        KeyedDropout(0.1, "experts.3", key)(torch.ones(4, 8))
