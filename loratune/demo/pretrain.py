"""Makes the demo's base model: `python -m loratune.demo.pretrain [--folder FOLDER]`, ten minutes on one core.

Trains a byte-level BPE tokenizer and a Llama of half a million parameters on the text of `world.py`,
one pass, no token seen twice. The only file of the demo that imports torch.
"""

import argparse
import itertools

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.demo.tasks import SEED, TRAIN_EXAMPLES, examples
from loratune.demo.world import documents

PRETRAINING_SEED = 20261123
VOCABULARY = 832
HIDDEN, LAYERS, HEADS, FEED_FORWARD = 96, 4, 4, 256
POSITIONS = 512
BATCH, LENGTH = 8, 128  # windows per step, tokens per window
STEPS = 4000
GAIN = 1.0
BACK=1
THETA=10000.0
LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
DECAY = 0.3  # the share of the steps, at the end, in which the learning rate goes down to zero linearly
UNANSWERED = 0.03  # share of documents that show the instruction form, never with its answer

# The fixed text of the Alpaca prompt: one token each, as the markers of a chat template are.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
MARKERS = ("\n\n### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:")


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
            sentence, inserted = (WITH_INPUT, MARKERS[1] + asked["input"]) if asked["input"] else (WITHOUT_INPUT, "")
            text = f"{sentence}{MARKERS[0]}{asked['instruction']}{inserted}{MARKERS[2]}\n{text}"
        yield text


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decodes to itself. A beginning-of-text token is put first, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    # A word is the same token at the start of a line and inside it: spaces go with the punctuation, not with the word.
    runs = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([runs, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    fixed = [WITH_INPUT, WITHOUT_INPUT, *MARKERS]
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
    texts, ids = pretraining_documents(seed), []
    while True:
        for encoded in tokenizer(list(itertools.islice(texts, 1000)))["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
        whole = len(ids) // (BATCH * LENGTH) * (BATCH * LENGTH)
        yield from torch.tensor(ids[:whole]).view(-1, BATCH, LENGTH)
        ids = ids[whole:]


def look_back(model: LlamaForCausalLM, heads: int = 2, amplitude: float = 4.0) -> None:
    """Start the first layer's first heads as previous-token heads, which a run this short would spend half its time to find.

    All embeddings get a common component along the diagonal u; those heads' queries and keys read it, and it alone sets
    their score: sum_k cos(w_k (i - j - 1)), over the fastest rotary frequencies w_k, highest where j = i - 1.
    """
    hidden, width = model.config.hidden_size, model.config.head_dim
    diagonal = torch.full((hidden,), hidden**-0.5)
    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq[:4]
    query, key = torch.zeros(width), torch.zeros(width)
    query[:4], query[width // 2 : width // 2 + 4] = frequencies.cos(), -frequencies.sin()
    key[:4] = 1.0
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding += embedding.norm(dim=1).mean() * diagonal
        for matrix, direction in ((attention.q_proj.weight, query), (attention.k_proj.weight, key)):
            reading = torch.outer(direction, diagonal) * amplitude / (hidden / 2) ** 0.5
            for head in range(heads):
                matrix[head * width : (head + 1) * width] += reading


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
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if BACK: look_back(model)
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
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and base model.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "model", help="where to write (default: beside this file)")
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
