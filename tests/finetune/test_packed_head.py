"""The loss through the frozen head, in half precision against float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from loratune.finetune.packed import head
from loratune.finetune.packed.head import frozen_head_nll

WORDS, FEATURES, COUNT = 2500, 64, 200  # three tiles


def made(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Hidden states that are sure of their labels, half of them very: logits of 10 and 25."""
    torch.manual_seed(0)
    weight, labels = torch.randn(WORDS, FEATURES) * 0.3, torch.randint(0, WORDS, (COUNT,))
    strength = torch.where(torch.arange(COUNT) % 2 == 0, 10.0, 25.0).unsqueeze(1)
    own = weight[labels]
    hidden = strength * own / (own * own).sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), torch.randn(WORDS).to(dtype) if bias else None, labels


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded(dtype: torch.dtype, bias: bool) -> None:
    """Rounded to bfloat16 they are off by 0.03 on average, and the surest tokens' NLL is below zero."""
    hidden, weight, offset, labels = made(dtype, bias)
    exact = hidden.double().requires_grad_()
    logits = exact @ weight.double().T + (offset.double() if offset is not None else 0)
    expected = functional.cross_entropy(logits, labels, reduction="none")
    expected.sum().backward()
    ours = hidden.clone().requires_grad_()
    nll = frozen_head_nll(ours, weight, offset, labels)
    nll.sum().backward()
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    assert nll.min() > -2e-5
    assert exact.grad is not None
    assert ours.grad is not None
    assert (ours.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_precision_stays_in_its_own(dtype: torch.dtype) -> None:
    hidden, weight, offset, labels = made(dtype, True)
    nll = frozen_head_nll(hidden, weight, offset, labels)
    assert nll.dtype == dtype
    torch.testing.assert_close(nll, functional.cross_entropy(hidden @ weight.T + offset, labels, reduction="none"), rtol=1e-4, atol=1e-5)


def test_on_a_gpu_the_product_itself_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch checks the call on tensors without contents."""
    seen = []
    mm = torch.mm
    monkeypatch.setattr(head.torch, "mm", lambda *given, **options: (seen.append(options.get("out_dtype")), mm(*given, **options))[1])
    with FakeTensorMode():
        h, w = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((5, 8), (8, 16)))
        out = head._product(h, w, out=torch.empty(5, 16, device="cuda"))
        assert (out.dtype, out.device.type) == (torch.float32, "cuda")
    assert seen == [torch.float32]
