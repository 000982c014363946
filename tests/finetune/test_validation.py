import math

import numpy as np
import pytest
import torch
import transformers
from test_lora import tiny
from tiny_tokens import random_tokens

from loratune.data import batches
from loratune.errors import DataError
from loratune.finetune import validation
from loratune.finetune.model import output_head
from loratune.finetune.validation import logits_nll, validate


def by_definition(model: transformers.PreTrainedModel, tokens: batches.Tokens, vocabulary: int = 50) -> float:
    """One example at a time, all logits, float64."""
    total, number = 0.0, 0
    for i in range(len(tokens)):
        ids, mask = tokens[i]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(np.array([ids % vocabulary]), dtype=torch.long)).logits[0].double()
        for t in range(1, len(ids)):
            if mask[t]:
                total -= logits[t - 1].log_softmax(-1)[ids[t] % vocabulary].item()
                number += 1
    return total / number


class Small:
    """The tokens of `random_tokens` in a vocabulary of 50."""

    def __init__(self, n: int) -> None:
        self._tokens = random_tokens(n, 3)
        self.lengths = self._tokens.lengths

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, i: int, /) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self._tokens[i]
        return ids % 50, mask


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "neox", "opt", "gemma2"])
def test_is_the_definition_for_every_batch_size_with_and_without_the_shortcut(kind: str) -> None:
    if kind == "gemma2":  # caps its logits after the head
        config = transformers.Gemma2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        config.final_logit_softcapping = 0.05
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny(kind)
    tokens = Small(13)
    expected = by_definition(model, tokens)
    for size in (1, 4, 13):
        for head in (output_head(model), None):
            loss, seconds = validate(model, tokens, batch_size=size, pad_id=7, head=head)
            assert loss == pytest.approx(expected, abs=1e-6)
            assert seconds > 0


def test_the_pad_token_does_not_matter_and_the_mode_is_kept() -> None:
    model, tokens = tiny("llama").train(), Small(9)
    losses = {validate(model, tokens, batch_size=4, pad_id=pad, head=output_head(model))[0] for pad in (0, 31)}
    assert len(losses) == 1
    assert model.training


def test_logits_are_computed_at_response_positions_only() -> None:
    model, tokens = tiny("llama"), Small(8)
    head = output_head(model)
    rows = []
    handle = head.register_forward_hook(lambda m, i, o: rows.append(o.shape[:-1].numel()))
    validate(model, tokens, batch_size=8, pad_id=0, head=head)
    handle.remove()
    assert rows == [batches.response_tokens(tokens, range(8))]


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(0, 11, (23,))
    results = []
    for chunk in (2**25, 11 * 5):
        monkeypatch.setattr(validation, "_CHUNK", chunk)
        torch.manual_seed(0)
        logits = torch.randn(23, 11, dtype=torch.float64, requires_grad=True)
        nll = logits_nll(logits, labels)
        nll.sum().backward()
        results.append((nll.detach(), logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert logits_nll(logits, torch.tensor([3])).item() == pytest.approx(math.log(1000), abs=1e-5)


def test_nothing_to_score_is_an_error() -> None:
    tokens = Small(2)

    class Prompts(Small):
        def __getitem__(self, i: int, /) -> tuple[np.ndarray, np.ndarray]:
            return tokens[i][0], np.zeros(len(tokens[i][0]), dtype=bool)

    with pytest.raises(DataError, match="no response token"):
        validate(tiny("llama"), Prompts(2), batch_size=2, pad_id=0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_a_global_batch_is_dealt_out_once(world: int, size: int, micro: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size)
    pieces = [batches.cut(lengths, micro, rank, world) for rank in range(world)]
    assert {len(p) for p in pieces} == {batches.micro_batch_count(size, micro, world)}
    assert sorted(int(slot) for p in pieces for piece in p for slot in piece) == list(range(size))
    assert max(len(piece) for p in pieces for piece in p) <= micro
