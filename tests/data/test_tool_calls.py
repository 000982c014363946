"""Calls of tools, their results, and several messages of the user, through chat templates: what is scored of them."""

import json

import pytest
import tiny_tokenizer

from loratune.data.formats import detect_format, parse_record
from loratune.data.prompts import UnfitError, choose_prompt
from loratune.data.sources import Example
from loratune.data.split import questions_of
from loratune.data.tokenizers import load_tokenizer

# Qwen 2.5's shape: objects as JSON, results within a turn of the user.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% else %}<|im_start|>{{ m.role }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% for call in m.tool_calls %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{ ARGUMENTS }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OBJECTS = QWEN.replace("ARGUMENTS", "call.function.arguments | tojson")
# DeepSeek's: the arguments put together with text.
TEXTS = (
    "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{% for call in m.tool_calls %}"
    "{{ call.function.name + ':' + call.function.arguments }}{% endfor %}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "text": "<|im_end|>"}'}}
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "assistant", "content": "Four."},
]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def tokenizer(folder, template):
    return load_tokenizer(str(tiny_tokenizer.build(folder, chat_template=template)))


def read(record):
    found = parse_record(record, detect_format(record))
    return Example(exchanges=found.exchanges, system=found.system, tools=found.tools, source="a.jsonl", place="line 1")


def shown(loaded, example):
    """The text, with [[ ]] around what is scored."""
    made = choose_prompt(loaded, "chat").encode(example, 10_000)
    text, before, stretch = "", False, []
    for token, scored in [*zip(made.input_ids, made.response_mask, strict=True), (None, None)]:
        if scored is not before:
            text += loaded.decode(stretch) + ("[[" if scored else "]]" if before else "")
            before, stretch = scored, []
        stretch.append(token)
    return text


def test_a_call_is_scored_whole_and_its_result_is_context(tmp_path):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "text": "<|im_end|>"}}\n</tool_call>'
    assert shown(tokenizer(tmp_path, OBJECTS), read({"messages": TALK, "tools": TOOLS})) == (
        f"<|im_start|>system\n{json.dumps(TOOLS)}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[{call}\n{call}"
        "<|im_end|>]]\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[Four.<|im_end|>]]"
    )


def test_a_call_behind_words_or_at_the_end_or_not_scored(tmp_path):
    loaded = tokenizer(tmp_path, OBJECTS)
    said = [TALK[0], TALK[1] | {"content": "Let me see."}]
    assert "assistant\n[[Let me see.\n<tool_call>" in shown(loaded, read({"messages": said}))
    assert shown(loaded, read({"messages": said})).endswith("</tool_call><|im_end|>]]")
    silent = shown(loaded, read({"messages": [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]}))
    assert silent.count("[[") == 1
    assert silent.endswith("[[Four.<|im_end|>]]")


@pytest.mark.parametrize("template", [TEXTS, QWEN.replace("ARGUMENTS", "call.function.arguments")])
def test_a_template_that_wants_arguments_as_text_gets_text(tmp_path, template):
    assert '{"a": 2, "text": "<|im_end|>"}' in shown(tokenizer(tmp_path, template), read({"messages": TALK}))


def test_a_template_that_drops_a_part_is_noticed(tmp_path):
    for dropped, part in ((" + m.content + '\n</tool_response>'", "results of tools"), ("{{ ARGUMENTS }}", "arguments of calls")):
        template = QWEN.replace(dropped, "").replace("ARGUMENTS", "call.function.arguments | tojson")
        with pytest.raises(UnfitError, match=f"it shows no {part}, and the row has some"):
            choose_prompt(tokenizer(tmp_path / part[:3], template), "chat").encode(read({"messages": TALK}), 1000)
    with pytest.raises(UnfitError, match="an answer does not appear in it as written"):
        choose_prompt(tokenizer(tmp_path / "plain", tiny_tokenizer.CHATML), "chat").encode(read({"messages": TALK}), 1000)
    with pytest.raises(UnfitError, match="for which prompt: alpaca has no place"):
        choose_prompt(tokenizer(tmp_path / "alpaca", OBJECTS), "alpaca").encode(read({"messages": TALK}), 1000)


def test_messages_of_the_user_in_a_row_stand_as_written_where_the_template_lets_them(tmp_path):
    talk = read(
        {"messages": [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}, {"role": "assistant", "content": "a"}]}
    )
    apart = shown(tokenizer(tmp_path / "a", tiny_tokenizer.CHATML), talk)
    assert apart == "<|im_start|>user\nOne<|im_end|>\n<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]"
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    joined = shown(tokenizer(tmp_path / "b", strict + tiny_tokenizer.CHATML), talk)
    assert joined == "<|im_start|>user\nOne\n\nTwo<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]"


def test_a_result_of_a_tool_is_no_question_that_links_conversations():
    assert questions_of(read({"messages": TALK})) == ("2+2",)
