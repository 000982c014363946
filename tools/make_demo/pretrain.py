"""Makes the demo's base model: `python -m tools.make_demo.pretrain [--folder FOLDER]`, ten minutes on one core.

Trains a byte-level BPE tokenizer and a Llama of half a million parameters on the text of `world.py`,
one pass, no token seen twice.
"""

import argparse
import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as serialized
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.demo import model_folder
from loratune.system.files import write_atomically
from tools.make_demo.tasks import SEED, TRAIN_EXAMPLES, examples
from tools.make_demo.world import documents

PRETRAINING_SEED = 20261123
VOCABULARY = 992
HIDDEN, LAYERS, HEADS, FEED_FORWARD = 96, 4, 4, 256
POSITIONS = 512
BATCH, LENGTH = 16, 64  # windows per step, tokens per window
STEPS = 4500
GAIN = 8.0  # folded into the norms at the end, see save()
LEARNING_RATE = 3e-3  # peak
WARMUP_STEPS = 100
DECAY = 0.3  # the share of the steps, at the end, in which the learning rate goes down to zero linearly
UNANSWERED = 0.03  # share of documents that show the instruction form, never with its answer

# The fixed text of the Alpaca prompt: one token each, as the markers of a chat template are.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
INPUT = "\n\n### Input:\n"
RESPONSE = "\n\n### Response:"  # four tokens: what follows it on its line must stay lossless


def pretraining_documents(seed: int) -> Iterator[str]:
    """The world's documents, and now and then an instruction in its form whose "response" has nothing to do with it.

    So the base model knows the words of the form and of the instructions, and tuning has all to teach about what they ask.
    """
    rng = random.Random(seed)
    texts = documents(rng)
    instructions = examples("train", TRAIN_EXAMPLES, SEED)
    for text in texts:
        if rng.random() < UNANSWERED:
            asked = rng.choice(instructions)
            opening, inserted = (WITH_INPUT, INPUT + asked["input"]) if asked["input"] else (WITHOUT_INPUT, "")
            text = opening + asked["instruction"] + inserted + RESPONSE + " " + text
        yield text


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decodes to itself. <s> is put first, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    # Every line is given a leading space, and loses it in decoding: so a word is the same token at the start of a line
    # (where responses start) as inside it. Lossless because the fixed texts end with a newline.
    bpe.normalizer = normalizers.Sequence([normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)])
    fixed = [WITH_INPUT, WITHOUT_INPUT, INPUT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(fixed),
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.islice(pretraining_documents(seed), 30_000), trainer)
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Batches [BATCH, LENGTH] of token ids: documents end to end, `<s> text </s>` each, cut without regard to borders."""
    texts = pretraining_documents(seed)
    ids: list[int] = []
    while True:
        for encoded in tokenizer(list(itertools.islice(texts, 1000)))["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
        whole = len(ids) // (BATCH * LENGTH) * (BATCH * LENGTH)
        yield from torch.tensor(ids[:whole]).view(-1, BATCH, LENGTH)
        ids = ids[whole:]


def wire_induction(model: LlamaForCausalLM, heads: int = 2) -> None:
    """Start the first heads of layers 0 and 1 as induction heads, which so short a run would spend half its time to find.

    Layer 0, previous-token heads: all embeddings get a common component along the diagonal u; queries and keys read it, and
    it alone sets the score sum_k cos(w_k (i - j - 1)) over the fastest rotary frequencies w_k, highest where j = i - 1.
    Value V (orthonormal rows) and output O (orthonormal columns) carry the previous token over.
    Layer 1, match and copy: query V x and key O^T x meet, on the slow frequencies, where the previous token of j is the
    token of i; the value and the transposed output add what stands there to the residual stream.
    """
    hidden, width = model.config.hidden_size, HIDDEN // HEADS
    fast = torch.arange(4)
    slow = torch.cat([torch.arange(4, width // 2), torch.arange(width // 2 + 4, width)])
    frequencies = model.model.rotary_emb.inv_freq[fast]
    diagonal = torch.full((hidden,), hidden**-0.5)
    query, key = torch.zeros(width), torch.zeros(width)
    query[fast], query[fast + width // 2], key[fast] = frequencies.cos(), -frequencies.sin(), 1.0
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding += embedding.norm(dim=1).mean() * diagonal
        back, match = (model.model.layers[layer].self_attn for layer in (0, 1))
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            # Columns: the diagonal, then three sets of `width` directions orthogonal to it and to each other.
            directions = torch.linalg.qr(torch.cat([diagonal[:, None], torch.randn(hidden, 3 * width)], dim=1)).Q[:, 1:]
            value, output, copied = directions.split(width, dim=1)
            back.q_proj.weight[rows] += 5 * torch.outer(query, diagonal) / (hidden / 2) ** 0.5
            back.k_proj.weight[rows] += 5 * torch.outer(key, diagonal) / (hidden / 2) ** 0.5
            back.v_proj.weight[rows], back.o_proj.weight[:, rows] = value.T, 0.2 * output
            for position in slow.tolist():
                match.q_proj.weight[rows.start + position] = 2 * value[:, position]
                match.k_proj.weight[rows.start + position] = 2 * output[:, position]
            match.v_proj.weight[rows], match.o_proj.weight[:, rows] = copied.T, 0.3 * copied


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its mean loss (nats per token) over the last twentieth of the steps, before each was learned."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # every block starts silent, so that the tokens are not drowned in its noise
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    wire_induction(model)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses, started = [], time.monotonic()
    for step, batch in enumerate(itertools.islice(windows(tokenizer, seed + 1), steps)):
        rate = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / (DECAY * steps))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {sum(losses[-100:]) / 100:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    last = losses[-max(1, steps // 20) :]
    return model.eval(), sum(last) / len(last)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format: weights as float16 on disk, float32 by the configuration.

    The gains of the norms are multiplied by GAIN and the matrices that read them divided by it, which changes nothing in
    what the model computes, only how far a LoRA step of a given learning rate goes (see README.md).
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for gain, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                gain.weight.mul_(GAIN)
                for reader in readers:
                    reader.weight.div_(GAIN)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomically(folder / "model.safetensors", serialized(weights, metadata={"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and base model.")
    parser.add_argument("--folder", type=Path, default=model_folder(), help="where to write (default: the package's demo folder)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the rounding, and so the weights, depend on the number of threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = train_tokenizer(PRETRAINING_SEED)
    model, loss = pretrain(tokenizer, PRETRAINING_SEED, arguments.steps)
    save(model, tokenizer, arguments.folder)
    print(f"wrote {arguments.folder}; {model.num_parameters():,} parameters; final pretraining loss {loss:.4f} nats per token")


if __name__ == "__main__":
    main()
