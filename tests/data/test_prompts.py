"""Which tokens an example becomes and which of them are learnt."""

from pathlib import Path

import pytest
import tiny_tokenizer

from loratune.data.prompts import UnfitError, alpaca_prompt, choose_prompt
from loratune.data.sources import DataSource, Example, Exchange, read_source
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import ModelError

CAPITAL = Example(exchanges=(Exchange("Name the capital of France.", "", "Paris"),))
TWO_TURNS = Example(exchanges=(Exchange("Hi", "", "Hello"), Exchange("Bye", "", "See you")), system="Be brief.")

# Stanford Alpaca's published texts, typed out once more.
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName the capital of France.\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\n{cat}\n\n### Response:"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_tokenizer(str(tiny_tokenizer.build(tmp_path_factory.mktemp("plain"))))


@pytest.fixture(scope="module", params=["chatml", "tagged"])
def chat(request, tmp_path_factory):
    template = {"chatml": tiny_tokenizer.CHATML, "tagged": tiny_tokenizer.TAGGED}[request.param]
    return load_tokenizer(str(tiny_tokenizer.build(tmp_path_factory.mktemp(request.param), chat_template=template)))


def pieces(encoded, tokenizer):
    """The text of each stretch of equal mask, as (is response, text)."""
    out: list[tuple[bool, list[int]]] = []
    for token, is_response in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if not out or out[-1][0] != is_response:
            out.append((is_response, []))
        out[-1][1].append(token)
    return [(is_response, tokenizer.decode(ids)) for is_response, ids in out]


def test_alpaca_prompt_is_the_published_one():
    assert alpaca_prompt("Name the capital of France.") == WITHOUT_INPUT
    assert alpaca_prompt("Translate.", "{cat}") == WITH_INPUT


def test_alpaca_learns_the_response_and_one_eos(plain):
    encoded = choose_prompt(plain, "alpaca").encode(CAPITAL, 512)
    assert pieces(encoded, plain) == [(False, WITHOUT_INPUT), (True, "Paris<|im_end|>")]
    assert encoded.input_ids.count(plain.eos_token_id) == 1
    assert not encoded.truncated


def test_golden_tokens_of_a_pretrained_tokenizer(tinystories):
    tokenizer = load_tokenizer(str(tinystories))
    encoded = choose_prompt(tokenizer, "alpaca").encode(CAPITAL, 512)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    response = [token for token, is_response in zip(tokens, encoded.response_mask, strict=True) if is_response]
    assert tokens[:6] == ["<|start_story|>", "▁", "B", "e", "lo", "w▁"]
    assert response == ["▁", "P", "ar", "is", "<|end_story|>"]
    assert tokens.count("<|start_story|>") == 1


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
@pytest.mark.parametrize(("instruction", "about", "system"), [("Hi", "", ""), ("Sum up:", "\n1 2", ""), ("Hi", "x", "Be brief.")])
def test_training_and_inference_see_the_same_prompt(chat, prompt, instruction, about, system):
    asked = choose_prompt(chat, prompt).question(instruction, about, system)
    for response in ("yes", "\nyes", "::", " yes"):  # each could merge with the prompt's last token
        encoded = choose_prompt(chat, prompt).encode(Example(exchanges=(Exchange(instruction, about, response),), system=system), 512)
        assert encoded.input_ids[: len(asked)] == asked
        assert encoded.response_mask == [False] * len(asked) + [True] * (len(encoded.input_ids) - len(asked))


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
def test_boundaries_of_real_rows_with_a_tokenizer_that_merges_across_words(shared_data, tinystories, prompt):
    tokenizer = load_tokenizer(str(tinystories))  # SentencePiece style: "e.\n" is one token, every text begins with a word-start mark
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    examples, _ = read_source(DataSource(path=str(shared_data / "alpaca" / "alpaca_random_9k.json")), "skip")
    chosen = choose_prompt(tokenizer, prompt)
    for example in examples[:300]:
        instruction, about, response, *_ = example.exchanges[0]
        asked = chosen.question(instruction, about)
        encoded = chosen.encode(example, 10_000)
        answered = encoded.input_ids[len(asked) :]
        assert encoded.input_ids[: len(asked)] == asked
        assert encoded.response_mask == [False] * len(asked) + [True] * len(answered)
        assert encoded.input_ids.count(tokenizer.bos_token_id) == encoded.input_ids.count(tokenizer.eos_token_id) == 1
        known = tokenizer.decode(tokenizer(response, add_special_tokens=False)["input_ids"])  # its vocabulary lacks some characters
        assert tokenizer.decode(answered[:-1]).split() == known.split()


def test_bos_and_eos_that_the_tokenizer_adds(tmp_path):
    tokenizer = load_tokenizer(str(tiny_tokenizer.build(tmp_path, bos=True, add_eos=True)))
    encoded = choose_prompt(tokenizer, "alpaca").encode(CAPITAL, 512)
    assert pieces(encoded, tokenizer) == [(False, "<|begin|>" + WITHOUT_INPUT), (True, "Paris<|im_end|>")]
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("response", ["Paris<|im_end|>", "Paris<|im_end|>\n", "Paris"])
def test_an_eos_spelt_out_in_the_data_is_not_doubled(chat, response):
    example = Example(exchanges=(Exchange("Where?", "", response),))
    for prompt in ("alpaca", "chat"):
        assert pieces(choose_prompt(chat, prompt).encode(example, 512), chat)[-1] == (True, "Paris<|im_end|>")


def test_a_special_token_inside_a_text_is_text(plain):
    example = Example(exchanges=(Exchange("What does <|im_end|> mean?", "", "<|im_end|> ends a message."),))
    encoded = choose_prompt(plain, "alpaca").encode(example, 512)
    assert encoded.input_ids.count(plain.eos_token_id) == 1
    assert pieces(encoded, plain)[-1] == (True, "<|im_end|> ends a message.<|im_end|>")


def test_alpaca_conversation_learns_every_answer(plain):
    encoded = choose_prompt(plain, "alpaca").encode(TWO_TURNS, 512)
    assert pieces(encoded, plain) == [
        (False, "Be brief.\n\n### Instruction:\nHi\n\n### Response:"),
        (True, "Hello<|im_end|>"),
        (False, "\n\n### Instruction:\nBye\n\n### Response:"),
        (True, "See you<|im_end|>"),
    ]


def test_chat_conversation_learns_every_answer(chat):
    encoded = choose_prompt(chat, "chat").encode(TWO_TURNS, 512)
    assert pieces(encoded, chat) == [
        (False, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hello<|im_end|>"),
        (False, "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
        (True, "See you<|im_end|>"),
    ]


def test_chat_template_that_shows_earlier_answers_differently(plain, monkeypatch):
    """Like Qwen3's: the last answer is preceded by a thinking part, which later disappears."""
    template = tiny_tokenizer.CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    )
    monkeypatch.setattr(plain, "chat_template", template)
    encoded = choose_prompt(plain, "chat").encode(TWO_TURNS, 512)
    learnt = [text for is_response, text in pieces(encoded, plain) if is_response]
    assert learnt == ["Hello<|im_end|>", "See you<|im_end|>"]


def test_chat_template_that_ends_answers_with_another_token_still_ends_with_eos(plain, monkeypatch):
    monkeypatch.setattr(plain, "chat_template", tiny_tokenizer.CHATML.replace("<|im_end|>", "<end>"))
    encoded = choose_prompt(plain, "chat").encode(CAPITAL, 512)
    assert pieces(encoded, plain)[-1] == (True, "Paris<end><|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if add_generation_prompt %}A{% else %}B{{ messages[-1]['content'] }}{% endif %}", "not the beginning of the whole"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "the answer does not appear"),
    ],
)
def test_chat_template_that_cannot_serve(plain, monkeypatch, template, message):
    monkeypatch.setattr(plain, "chat_template", template)
    with pytest.raises(ModelError, match=f"{message}.*Use prompt: alpaca"):
        choose_prompt(plain, "auto")


def test_row_that_a_chat_template_refuses(plain, monkeypatch):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + tiny_tokenizer.CHATML
    monkeypatch.setattr(plain, "chat_template", refuses)
    with pytest.raises(UnfitError, match=r"a.json, record 3: the chat template cannot show this conversation: no system role"):
        choose_prompt(plain, "chat").encode(Example(exchanges=CAPITAL.exchanges, system="S", source="a.json", place="record 3"), 512)


def test_cut_and_dropped(plain):
    whole = choose_prompt(plain, "alpaca").encode(CAPITAL, 512)
    asked = whole.response_mask.index(True)
    cut = choose_prompt(plain, "alpaca").encode(CAPITAL, asked + 1)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[: asked + 1]
    assert sum(cut.response_mask) == 1
    assert plain.eos_token_id not in cut.input_ids  # what was cut has not ended
    assert not choose_prompt(plain, "alpaca").encode(CAPITAL, len(whole.input_ids)).truncated
    assert choose_prompt(plain, "alpaca").encode(CAPITAL, asked) is None


def test_tokenizers_that_cannot_serve(plain, tmp_path: Path):
    with pytest.raises(ModelError, match=r"no chat template\. Use prompt: alpaca"):
        choose_prompt(plain, "chat")
    with pytest.raises(ModelError, match="no EOS token"):
        choose_prompt(load_tokenizer(str(tiny_tokenizer.build(tmp_path, eos=None))), "alpaca")
