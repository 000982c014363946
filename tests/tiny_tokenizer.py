"""A real Transformers tokenizer in a folder, made in milliseconds: byte-level BPE trained on a few sentences."""

from collections.abc import Sequence
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = ["Name the capital of France. Paris is the capital.", "### Instruction:\n### Input:\n### Response:", "Below is an instruction"]


def build(
    folder: Path,
    *,
    eos: str | None = "<|im_end|>",
    bos: bool = False,
    add_eos: bool = False,
    chat_template: str | None = None,
    specials: Sequence[str] = (),
    added: Sequence[str] = (),
    bos_token: str = "<|begin|>",
    rstrip: bool = False,
) -> Path:
    """Save the tokenizer in `folder` and return it. `bos`, `add_eos`: what it adds around a text.

    specials, added: more tokens, special or not; rstrip: the special ones swallow the white space behind them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=own, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos or add_eos:
        shape = ("<|begin|> " if bos else "") + "$A" + (" <|im_end|>" if add_eos else "")
        tokenizer.post_processor = processors.TemplateProcessing(single=shape, special_tokens=[(s, tokenizer.token_to_id(s)) for s in own])
    tokenizer.add_special_tokens([AddedToken(s, rstrip=rstrip, normalized=False, special=True) for s in specials])
    tokenizer.add_tokens([AddedToken(s, normalized=False) for s in added])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos_token)
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return folder
