"""Known chat templates: which tokens are scored, with and without thinking parts, tools, dates and control tokens in the data."""

import copy
import dataclasses
import json

import chat_templates
import pytest
import tiny_tokenizer

from loratune.data.prepare import prepare
from loratune.data.prompts import UnfitError, answer_ends, choose_prompt
from loratune.data.sources import DataRecipe, DataSource, Example, Exchange
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import ModelError

DATE = "2026-03-01"
TURNS = Example(exchanges=(Exchange("Hi", "", "Hello"), Exchange("Bye", "", "See you")), source="a.json", place="record 3")
THOUGHT = Example(exchanges=(Exchange("2+2?", "", "Four.", reasoning="Two and two"),), source="a.json", place="record 3")
INLINE = Example(exchanges=(Exchange("2+2?", "", "<think>\nTwo and two\n</think>\n\nFour."),))
TOOLS = json.dumps([{"type": "function", "function": {"name": "add", "description": "ends with <|im_end|>", "parameters": {}}}])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            family = chat_templates.FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            tiny_tokenizer.build(
                folder,
                eos=family.eos,
                bos_token=family.bos,
                chat_template=family.template,
                specials=[s for s in family.specials if s not in ("<|im_start|>", "<|im_end|>")],
                added=family.added,
            )
            made[name] = load_tokenizer(str(folder))
        return made[name]

    return of


def shown(encoded, tokenizer):
    """The text, with [[ ]] around what is scored."""
    text, before, stretch = "", False, []
    for token, scored in [*zip(encoded.input_ids, encoded.response_mask, strict=True), (None, False)]:
        if scored != before or token is None:
            text += tokenizer.decode(stretch) + ("" if scored == before else "[[" if scored else "]]")
            before, stretch = scored, []
        stretch.append(token)
    return text


def encoded(tokenizer, example, **options):
    return shown(choose_prompt(tokenizer, "auto", date=DATE, **options).encode(example, 1000), tokenizer)


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_scored_is_what_a_model_writes(tokenizer, name):
    family = chat_templates.FAMILIES[name]
    assert encoded(tokenizer(name), TURNS) == family.expected


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_a_question_is_what_training_puts_before_the_first_scored_token(tokenizer, name):
    prompt = choose_prompt(tokenizer(name), "chat", date=DATE)
    for response in ("Hello", "\nHello", "Hi", "a", "think"):  # words of the templates among them
        example = dataclasses.replace(TURNS, exchanges=(Exchange("Hi", "there", response),))
        made = prompt.encode(example, 1000)
        assert prompt.question("Hi", "there") == made.input_ids[: made.response_mask.index(True)]


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_an_answer_ends_with_one_token_which_stops_generation(tokenizer, name):
    loaded = tokenizer(name)
    prompt = choose_prompt(loaded, "chat", date=DATE)
    made = prompt.encode(TURNS, 1000)
    assert made.response_mask[-1]
    assert {made.input_ids[-1]} == prompt.ends
    assert answer_ends(loaded) == prompt.ends | {loaded.eos_token_id}
    spelt = dataclasses.replace(
        TURNS, exchanges=(*TURNS.exchanges[:1], Exchange("Bye", "", f"See you{loaded.decode(made.input_ids[-1])}\n"))
    )
    assert prompt.encode(spelt, 1000) == made


def test_generation_tags_change_nothing(tmp_path):
    """Whether they hold the answer alone or the end of the turn too."""
    family = chat_templates.FAMILIES["gemma-2"]
    content = "m['content'] | trim"
    for inside, outside in ((content, " + '<end_of_turn>\n'"), (content + " + '<end_of_turn>\n'", "")):
        tagged = family.template.replace(
            "'\n' + m['content'] | trim + '<end_of_turn>\n' }}",
            "'\n' }}{% if role == 'model' %}{% generation %}{{ "
            + inside
            + " }}{% endgeneration %}{% else %}{{ "
            + inside
            + " }}{% endif %}"
            "{{ ''" + outside + " }}",
        )
        assert tagged != family.template
        loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path, eos="<eos>", bos_token="<bos>", specials=family.specials)))
        loaded.chat_template = tagged
        assert encoded(loaded, TURNS) == family.expected


def test_white_space_that_control_tokens_swallow(tokenizer, tmp_path):
    """Phi-3's tokens do; a mask found by characters then falls on the role header."""
    family = chat_templates.FAMILIES["phi-3"]
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path, eos=family.eos, specials=family.specials, rstrip=True)))
    loaded.chat_template = family.template
    spaced = dataclasses.replace(TURNS, exchanges=(*TURNS.exchanges, Exchange("More", "", "\nYes")))
    assert encoded(loaded, spaced) == (
        "<|user|>Hi<|end|><|assistant|>[[Hello<|end|>]]<|user|>Bye<|end|><|assistant|>[[See you<|end|>]]"
        "<|user|>More<|end|><|assistant|>[[Yes<|end|>]]"
    )


NO_END = {
    "letters": (
        tiny_tokenizer.CHATML.replace("<|im_end|>", "<end>"),
        "[[Hello<end>]]\n<|im_start|>user\nBye<end>\n<|im_start|>assistant\n[[See you<end><eos>]]",
    ),
    "nothing": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "assistant: [[Hello]]\nuser: Bye\nassistant: [[See you<eos>]]",
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}\n{% endif %}"
        "{% endfor %}",
        "Q: Hi\nA:[[ Hello]]\nQ: Bye\nA:[[ See you<eos>]]",
    ),
}


@pytest.mark.parametrize(("template", "expected"), NO_END.values(), ids=NO_END)
def test_where_no_token_ends_a_turn_the_last_answer_ends_with_eos(tmp_path, template, expected):
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path, eos="<eos>", specials=["<eos>"], chat_template=template)))
    assert encoded(loaded, TURNS).endswith(expected)


def test_without_a_template_auto_is_alpaca(tmp_path):
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path)))
    assert choose_prompt(loaded, "auto").note == "alpaca, because the tokenizer has no chat template"
    loaded.chat_template = tiny_tokenizer.CHATML
    assert choose_prompt(loaded, "auto").note == "chat, the tokenizer's own template; answers end with <|im_end|>"
    assert choose_prompt(loaded, "alpaca").note == "alpaca, as asked: the tokenizer's own chat template is not what is trained"


# ---- thinking parts ----

SHOWN = {
    "qwen3": "<|im_start|>assistant\n[[<think>\nTwo and two\n</think>\n\nFour.<|im_end|>]]",
    "qwen3-thinking": "<|im_start|>assistant\n<think>\n[[Two and two\n</think>\n\nFour.<|im_end|>]]",
    "deepseek-r1": "<｜Assistant｜><think>\n[[Two and two\n</think>\n\nFour.<｜end▁of▁sentence｜>]]",
    "gpt-oss": "<|start|>assistant[[<|channel|>analysis<|message|>Two and two<|end|><|start|>assistant"
    "<|channel|>final<|message|>Four.<|return|>]]",
}
UNSCORED = {
    "qwen3": "<think>\nTwo and two\n</think>\n\n[[Four.<|im_end|>]]",
    "qwen3-thinking": "<think>\nTwo and two\n</think>\n\n[[Four.<|im_end|>]]",
    "deepseek-r1": "<think>\nTwo and two\n</think>\n\n[[Four.<｜end▁of▁sentence｜>]]",
    "gpt-oss": "<|channel|>final<|message|>[[Four.<|return|>]]",
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("example", [THOUGHT, INLINE], ids=["field", "inline"])
def test_a_thinking_part_is_scored_or_not(tokenizer, name, example):
    assert encoded(tokenizer(name), example).endswith(SHOWN[name])
    assert encoded(tokenizer(name), example, score_reasoning=False).endswith(UNSCORED[name])
    prompt = choose_prompt(tokenizer(name), "chat", date=DATE)
    made = prompt.encode(example, 1000)
    assert prompt.question("2+2?", thinking=True) == made.input_ids[: made.response_mask.index(True)]


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_an_empty_thinking_part_is_scored_where_the_data_have_one(tokenizer, name):
    without = dataclasses.replace(INLINE, exchanges=(Exchange("2+2?", "", "Four."),))
    empty = dataclasses.replace(INLINE, exchanges=(Exchange("2+2?", "", "<think>\n\n</think>\n\nFour."),))
    loaded = tokenizer(name)
    end = loaded.eos_token
    assert encoded(loaded, without).endswith(f"<think>\n\n</think>\n\n[[Four.{end}]]")
    begun = "<think>\n[[" if name == "deepseek-r1" else "[[<think>\n"
    assert encoded(loaded, empty).endswith(f"{begun}\n</think>\n\nFour.{end}]]")
    assert encoded(loaded, empty, score_reasoning=False) == encoded(loaded, without)


@pytest.mark.parametrize("name", ["chatml", "smollm3"])
def test_a_thinking_part_written_into_the_answer(tokenizer, name):
    """Of a template that knows of none, it stays where it is."""
    text = "<|im_start|>assistant\n<think>\nTwo and two\n</think>\n\nFour.<|im_end|>"
    assert encoded(tokenizer(name), INLINE).endswith(text.replace("<think>", "[[<think>") + "]]")
    assert encoded(tokenizer(name), INLINE, score_reasoning=False).endswith(text.replace("\n\nFour", "[[\n\nFour") + "]]")


@pytest.mark.parametrize("name", ["chatml", "smollm3", "llama-3", "gemma-2"])
def test_a_template_that_drops_the_thinking_part_is_noticed(tokenizer, name):
    with pytest.raises(UnfitError, match=r"a.json, record 3: .* does not show the thinking part"):
        encoded(tokenizer(name), THOUGHT)


def test_thinking_parts_of_earlier_answers_are_counted(tokenizer):
    two = dataclasses.replace(THOUGHT, exchanges=(*THOUGHT.exchanges, Exchange("And 3+3?", "", "Six.", reasoning="Three and three")))
    prompt = choose_prompt(tokenizer("qwen3"), "chat")
    assert prompt.encode(two, 1000).reasoning_left_out == 1
    assert shown(prompt.encode(two, 1000), tokenizer("qwen3")) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[Four.<|im_end|>]]\n<|im_start|>user\nAnd 3+3?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nThree and three\n</think>\n\nSix.<|im_end|>]]"
    )


@pytest.mark.parametrize("score_reasoning", [True, False])
def test_alpaca_scores_a_thinking_part_or_not(tokenizer, score_reasoning):
    loaded = tokenizer("chatml")
    text = shown(choose_prompt(loaded, "alpaca", score_reasoning=score_reasoning).encode(INLINE, 1000), loaded)
    thought = "<think>\nTwo and two\n</think>\n\n"
    assert text.endswith(f"Response:[[{thought}Four.<|im_end|>]]" if score_reasoning else f"Response:{thought}[[Four.<|im_end|>]]")


# ---- what is not an answer ----


@pytest.mark.parametrize("kind", ["chat", "alpaca"])
def test_an_answer_that_is_context_only(tokenizer, kind):
    loaded = tokenizer("chatml")
    first, second = TURNS.exchanges
    prompt = choose_prompt(loaded, kind)
    for exchanges, scored in (
        ((first._replace(scored=False), second), ["See you<|im_end|>"]),
        ((first, second._replace(scored=False)), ["Hello<|im_end|>"]),
    ):
        text = shown(prompt.encode(dataclasses.replace(TURNS, exchanges=exchanges), 1000), loaded)
        assert [part.partition("]]")[0] for part in text.split("[[")[1:]] == scored
        whole = shown(prompt.encode(TURNS, 1000), loaded)
        assert whole.replace("[[", "").replace("]]", "").startswith(text.replace("[[", "").replace("]]", ""))
    unscored = tuple(exchange._replace(scored=False) for exchange in TURNS.exchanges)
    assert prompt.encode(dataclasses.replace(TURNS, exchanges=unscored), 1000) is None


@pytest.mark.parametrize("name", ["llama-3.2", "qwen3"])
def test_tools_are_shown(tokenizer, name):
    text = encoded(tokenizer(name), dataclasses.replace(TURNS, tools=TOOLS))
    assert '"add"' in text.partition("[[")[0].replace(" ", "")


@pytest.mark.parametrize("name", ["chatml", "gemma-2", "phi-4"])
def test_a_template_that_ignores_tools_is_noticed(tokenizer, name):
    with pytest.raises(UnfitError, match=r"a.json, record 3: .* shows no tools"):
        encoded(tokenizer(name), dataclasses.replace(TURNS, tools=TOOLS))


def test_a_template_that_drops_the_system_message_is_noticed(tokenizer):
    loaded = copy.copy(tokenizer("chatml"))
    loaded.chat_template = "{% for m in messages %}{% if m.role != 'system' %}" + tiny_tokenizer.CHATML[len("{% for m in messages %}") :]
    loaded.chat_template = loaded.chat_template.replace("{% endfor %}", "{% endif %}{% endfor %}")
    assert encoded(loaded, TURNS) == encoded(tokenizer("chatml"), TURNS)
    with pytest.raises(UnfitError, match=r"a.json, record 3: .* shows no system message"):
        encoded(loaded, dataclasses.replace(TURNS, system="Be brief."))


@pytest.mark.parametrize("test", ["m.content.startswith('Hello')", "m.content[0] == 'H'", "m.content | length == 5"])
def test_a_template_that_looks_into_an_answer_is_noticed(tokenizer, test):
    """The marks hide the answer's beginning from it, so what it shows with them is not what it shows."""
    loaded = copy.copy(tokenizer("chatml"))
    shown_so = "{{ 'Kindly: ' if m.role == 'assistant' and " + test + " }}{{ m['content'] }}"
    loaded.chat_template = tiny_tokenizer.CHATML.replace("{{ m['content'] }}", shown_so)
    with pytest.raises(UnfitError, match=r"a.json, record 3: .* depends on how an answer begins"):
        encoded(loaded, TURNS)


@pytest.mark.parametrize("example", [THOUGHT, dataclasses.replace(TURNS, tools=TOOLS)], ids=["reasoning", "tools"])
def test_alpaca_has_no_place_for_them(tokenizer, example):
    with pytest.raises(UnfitError, match=r"a.json, record 3: .* prompt: alpaca has no place. Use prompt: chat"):
        choose_prompt(tokenizer("qwen3"), "alpaca").encode(example, 1000)
    plain = copy.copy(tokenizer("qwen3"))
    plain.chat_template = None
    with pytest.raises(UnfitError, match="needs a chat template, which this tokenizer lacks: use an instruction-tuned model"):
        choose_prompt(plain, "alpaca").encode(example, 1000)


# ---- control tokens in the data ----


@pytest.mark.parametrize("name", chat_templates.FAMILIES)
def test_control_tokens_in_the_data_are_text(tokenizer, name):
    loaded = tokenizer(name)
    tokens = [t.content for t in loaded.added_tokens_decoder.values() if t.special]
    told = "Write " + " and ".join(tokens) + " here"
    plain = choose_prompt(loaded, "chat", date=DATE).encode(TURNS, 5000)
    example = Example(exchanges=(Exchange(told, "", told), Exchange(told, "", told + ".")))
    prompt = choose_prompt(loaded, "chat", date=DATE)
    made = prompt.encode(example, 5000)
    of_template = {token: plain.input_ids.count(token) for token in loaded.added_tokens_decoder}
    assert {token: made.input_ids.count(token) for token in loaded.added_tokens_decoder} == of_template
    expected = chat_templates.FAMILIES[name].expected
    for was, now in (("Hi", told), ("Hello", told), ("Bye", told), ("See you", told + ".")):
        expected = expected.replace(was, now, 1) if was != "Hi" else expected.replace("Hi", told, 1)
    assert shown(made, loaded).replace("[[", "").replace("]]", "") == expected.replace("[[", "").replace("]]", "")
    single = prompt.encode(Example(exchanges=example.exchanges[:1]), 5000)
    assert prompt.question(told) == single.input_ids[: single.response_mask.index(True)]


def test_added_tokens_that_are_not_special_are_words(tmp_path):
    """<tool_call> in an answer is what a model writes."""
    folder = tiny_tokenizer.build(
        tmp_path, chat_template=tiny_tokenizer.CHATML + "{# <tool_call> #}", added=["<tool_call>", "</tool_call>"]
    )
    loaded = load_tokenizer(str(folder))
    example = Example(exchanges=(Exchange("Add.", "", "<tool_call>{}</tool_call>"),))
    made = choose_prompt(loaded, "chat").encode(example, 100)
    assert [made.input_ids.count(loaded.convert_tokens_to_ids(tag)) for tag in ("<tool_call>", "</tool_call>")] == [1, 1]


# ---- the date ----

DATED = [name for name, family in chat_templates.FAMILIES.items() if "strftime_now" in family.template]


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_the_one_that_was_given(tokenizer, name):
    loaded = tokenizer(name)
    prompt = choose_prompt(loaded, "chat", date="2031-12-09")
    assert (prompt.date, prompt.note.rpartition("; ")[2]) == ("2031-12-09", "its date is 2031-12-09")
    text = shown(prompt.encode(TURNS, 1000), loaded)
    assert any(day in text for day in ("09 Dec 2031", "December 09, 2031", "09 December 2031", "2031-12-09"))
    assert any(
        day in loaded.decode(prompt.question("Hi")) for day in ("09 Dec 2031", "December 09, 2031", "09 December 2031", "2031-12-09")
    )
    assert "strftime_now" in loaded.chat_template  # the tokenizer is handed on as it was


def test_the_date_of_a_template_for_tools_alone(tmp_path):
    """Its text is a file of its own, which tells one prepared folder from another."""
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path / "tokenizer")))
    dated = "{{ strftime_now('%d %b %Y') }} {{ tools | tojson }}" + tiny_tokenizer.CHATML
    loaded.chat_template = {"default": tiny_tokenizer.CHATML, "tool_use": dated}
    loaded.save_pretrained(tmp_path / "tokenizer")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": [{"role": "user", "content": str(i)}, *messages[1:]], "tools": json.loads(TOOLS)} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    recipe = DataRecipe(train=(DataSource(path=str(tmp_path / "a.json")),), validation_fraction=0.5)
    made = [prepare(recipe, tokenizer=str(tmp_path / "tokenizer"), cache=tmp_path, date=date) for date in (DATE, "2031-12-09")]
    assert [one.manifest.prompt.date for one in made] == [DATE, "2031-12-09"]
    assert loaded.decode(made[1].train[0][0]).startswith("09 Dec 2031 [{")


def test_templates_without_a_default(tmp_path):
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path)))
    loaded.chat_template = {"tool_use": tiny_tokenizer.CHATML, "rag": tiny_tokenizer.CHATML}
    with pytest.raises(ModelError, match=r"chat template cannot show .* no default specified.* Use prompt: alpaca"):
        choose_prompt(loaded, "auto")
    assert choose_prompt(loaded, "alpaca").kind == "alpaca"


def test_a_template_without_a_date_has_none(tokenizer):
    assert DATED == ["llama-3.2", "granite", "smollm3", "gpt-oss"]
    assert choose_prompt(tokenizer("chatml"), "chat", date=DATE).date == ""


def test_a_date_in_a_format_that_the_template_works_out(tokenizer, tmp_path):
    """And a template whose beginning is white space, which a macro before it must not change."""
    loaded = load_tokenizer(str(tiny_tokenizer.build(tmp_path)))
    template = "\n  {% set how = '%-d.%m.%y (%A)' %}{{ strftime_now(how) }}{{ ' ' + strftime_now('%H:%M') }}\n" + tiny_tokenizer.CHATML
    loaded.chat_template = template
    assert encoded(loaded, TURNS).startswith("\n1.03.26 (Sunday) 00:00\n<|im_start|>user")
