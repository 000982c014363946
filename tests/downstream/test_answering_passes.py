"""What a pass does less of, or otherwise than Transformers' own: the same numbers."""

from pathlib import Path

import pytest
import torch
import transformers
from random_adapters import load_base
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loratune.downstream.answering.decode_attention import decode_attention, decoding
from loratune.downstream.answering.forward import SPARE, Forward, cached_layers, joined
from loratune.finetune.model import BaseModel


@pytest.fixture(scope="module")
def base(tinystories: Path) -> BaseModel:
    return load_base(tinystories)


@pytest.mark.parametrize("groups", [2, 6])
def test_attention_of_one_token(groups: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 6 // groups
    query, key, value = torch.randn(5, 6, 1, 8), torch.randn(5, groups, 11, 8), torch.randn(5, groups, 11, 8)
    seen = torch.rand(5, 1, 1, 11) < 0.6
    seen[..., 0] = True
    expected, _ = sdpa_attention_forward(module, query, key, value, seen, scaling=0.3)
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(decode_attention(module, query, key, value, added, scaling=0.3)[0], expected)


def test_last_layer_works_on_the_last_position(base: BaseModel) -> None:
    seen = []
    handle = base.model.model.layers[-1].mlp.gate_proj.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[1]))
    ids = torch.tensor([base.tokenizer("Once upon a time there was a cat")["input_ids"]])
    with torch.inference_mode(), decoding(base.model):
        logits, cache = Forward(base).run(ids)
    with torch.inference_mode():
        expected = base.model(ids, past_key_values=transformers.DynamicCache(), use_cache=True)
    handle.remove()
    assert seen == [1, ids.shape[1]]
    torch.testing.assert_close(logits[:, -1], expected.logits[:, -1])
    for ours, theirs in zip(cache.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_more_tokens_than_there_was_room_for(base: BaseModel) -> None:
    forward, ids = Forward(base), torch.tensor([base.tokenizer("The cat sat on the mat and")["input_ids"]])
    more = torch.arange(3, 3 + 2 * SPARE + 1)
    with torch.inference_mode(), decoding(base.model):
        _, cache = forward.run(ids)
        cache = joined([cached_layers(cache, slice(None))], 1)
        mask = torch.zeros(1, ids.shape[1] + 4 * SPARE, dtype=torch.long)
        mask[:, : ids.shape[1]] = 1
        for token in more:
            positions = mask.sum(1, keepdim=True)
            mask[:, cache.get_seq_length()] = 1
            logits, cache = forward.run(token.view(1, 1), cache, mask=mask[:, : cache.get_mask_sizes(1, 0)[0]], positions=positions)
        expected = base.model(torch.cat([ids, more.view(1, -1)], dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
