"""What the fields of a record mean: read, refused, or counted as not read; none is dropped without a word."""

import json

import pytest

from loratune.data.fields import BadError
from loratune.data.formats import detect_format, parse_record
from loratune.data.prepared import SourceCounts
from loratune.data.sources import Example, Exchange, fields_of

ALPACA = {"instruction": "And how old is it?", "input": "", "output": "Ten."}


def conversation(*answers, **more):
    """Messages with these fields in the assistant's."""
    turns = [[{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}", **own}] for n, own in enumerate(answers)]
    return {"messages": [message for turn in turns for message in turn], **more}


def read(record):
    return parse_record(record, detect_format(record))


# ---- what is read ----


@pytest.mark.parametrize("name", ["instruction", "dolly", "prompt"])
@pytest.mark.parametrize("spelt", [[["Who?", "Tom."]], '[["Who?", "Tom."]]', (("Who?", "Tom."),)])
def test_history_stands_before_the_question_and_is_scored(name, spelt):
    spelt = list(spelt) if isinstance(spelt, tuple) else spelt
    record = {"instruction": ALPACA, "dolly": {"instruction": "Q", "response": "A"}, "prompt": {"prompt": "Q", "completion": "A"}}[name]
    found = read(record | {"history": spelt})
    assert found.exchanges[0] == Exchange("Who?", "", "Tom.", scored=True)
    assert (len(found.exchanges), found.history, found.unread) == (2, 1, ())


@pytest.mark.parametrize("nothing", [None, [], "", "[]", " "])
def test_no_history(nothing):
    assert read(ALPACA | {"history": nothing}).exchanges == (Exchange(ALPACA["instruction"], "", "Ten."),)


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_an_answer_that_is_context_only(name, no, yes):
    found = read(conversation({name: no}, {name: yes}))
    assert [exchange.scored for exchange in found.exchanges] == [False, True]
    assert found.unread == ()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(name):
    found = read(conversation({name: "Hm."}, {name: None}))
    assert [exchange.reasoning for exchange in found.exchanges] == ["Hm.", ""]
    assert found.unread == ()


def test_reasoning_of_a_single_answer():
    assert read(ALPACA | {"reasoning_content": "Hm."}).exchanges[0].reasoning == "Hm."


TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": 2}}}]


@pytest.mark.parametrize("record", [ALPACA, conversation({}), {"conversations": conversation({})["messages"]}])
@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_kept_as_json_in_the_order_given(record, given):
    assert read(record | {"tools": given}).tools == json.dumps(TOOLS, ensure_ascii=False)
    assert read(record | {"tools": None}).tools == read(record | {"tools": []}).tools == ""


def test_other_spellings():
    assert read({"instruction": "q", "input": "about", "response": "a"}).exchanges[0].input == "about"
    assert read({"instruction": "q", "context": "about", "output": "a"}).exchanges[0].input == "about"
    assert read(ALPACA | {"system_prompt": "Be brief."}).system == "Be brief."
    assert read({"messages": [{"role": "developer", "content": "Be brief."}, *conversation({})["messages"]]}).system == "Be brief."
    assert read(ALPACA | {"label": True, "kto_tag": True, "weight": 1, "train": "true"}).unread == ()


def test_prompt_and_completion_of_messages():
    """TRL scores the completion alone."""
    first, second = conversation({}, {})["messages"][:2], conversation({}, {})["messages"][2:]
    found = read({"prompt": [*first, second[0]], "completion": [second[1]]})
    assert found.exchanges == (Exchange("q0", "", "a0", scored=False), Exchange("q1", "", "a1"))


# ---- what is refused ----

REFUSED = {
    "history of one text": (ALPACA | {"history": [["Who?"]]}, r"^history\[1\]: expected a pair of texts"),
    "history without an answer": (ALPACA | {"history": [["Who?", None]]}, r"^history\[1\]: expected a pair of texts"),
    "history as an object": (ALPACA | {"history": {"a": "b"}}, "^field history: expected a list of pairs"),
    "history as text": (ALPACA | {"history": "Who? Tom."}, "^field history: expected a list of pairs"),
    "half a weight": (conversation({"weight": 0.5}), r"^messages\[2\]\.weight: expected 0 or 1, .* found the number 0\.5"),
    "weight in words": (conversation({"train": "maybe"}), r"^messages\[2\]\.train: expected 0 or 1"),
    "contradiction": (conversation({"weight": 0, "train": True}), r"^messages\[2\]\.weight and train: contradict"),
    "part of an answer": (
        conversation({"train_detail": [{"begin_offset": 0}]}),
        r"^messages\[2\]\.train_detail: an answer is scored as a whole",
    ),
    "no scored answer": (conversation({"weight": 0}, {"train": False}), "^no answer is scored"),
    "a trained question": (
        {"messages": [{"role": "user", "content": "q", "train": True}]},
        "^messages.1.: a message of the user is marked",
    ),
    "reasoning of a user": ({"messages": [{"role": "user", "content": "q", "thinking": "x"}]}, "^messages.1.: .* has a reasoning part"),
    "two reasonings": (conversation({"reasoning": "x", "thinking": "y"}), r"^messages\[2\]\.reasoning and thinking: mean the same"),
    "weight of a row": (ALPACA | {"weight": 0.5}, "^field weight: expected 0 or 1"),
    "row not to be learnt": (ALPACA | {"weight": 0}, "^the row is marked as not to be trained on"),
    "unwanted answer": ({"prompt": "q", "completion": "a", "label": False}, "^field label: false marks a rejected answer"),
    "two systems": (
        conversation({}, system="B") | {"messages": [{"role": "system", "content": "A"}, *conversation({})["messages"]]},
        "two diff",
    ),
    "two inputs": (ALPACA | {"input": "a", "context": "b"}, "^field input and context: mean the same"),
    "tools of text": (ALPACA | {"tools": "calculator"}, "^field tools: expected a list of objects"),
    "tools by name": (ALPACA | {"tools": ["calculator"]}, r"^tools\[1\]: expected an object that describes a function"),
    "functions": (conversation({}, functions=[{"name": "f"}]), "^field functions: .* write the functions as tools"),
    "a call without a name": (
        conversation({"tool_calls": [{"id": "1"}]}),
        r"^messages\[2\]\.tool_calls\[1\]: expected a call of a tool, an object with name and arguments",
    ),
    "a call of the user": ({"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}, "only the assistant may"),
    "a result without a call": ({"messages": [{"role": "tool", "content": "4"}]}, r"^messages\[1\]: a result of a tool, but no call"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": "x"}]}]},
        r"^messages\[1\]\.content\[2\]: expected a part of type text",
    ),
    "a part that is scored by itself": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "train": True}]}]},
        r"^messages\[1\]\.content\[1\]: an answer is scored as a whole",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    record, message = REFUSED[name]
    with pytest.raises(BadError, match=message):
        read(record)


# ---- messages that are more than a question and its answer ----


def test_several_messages_of_the_user_in_a_row():
    found = read({"messages": [{"role": "user", "content": t} for t in ("One", "Two")] + [{"role": "assistant", "content": "a"}]})
    assert found.exchanges[0][:3] == ("One\n\nTwo", "", "a")
    assert [m["content"] for m in json.loads(found.exchanges[0].asked)] == ["One", "Two"]


def test_content_as_parts_of_text_is_joined_as_templates_do():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?", "cache_control": {"type": "x"}}]
    found = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "I."}]}]})
    assert found.exchanges == (Exchange("Who are you?", "", "I."),)
    assert found.unread == ("messages[].content[].cache_control",)


CALL = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
ASKED = {"role": "user", "content": "2+2?"}
SPELT = {
    "OpenAI": [{"role": "assistant", "content": None, "tool_calls": [{**CALL[0], "function": {"name": "add", "arguments": '{"a": 2}'}}]}],
    "objects": [{"role": "assistant", "tool_calls": CALL}],
    "earlier": [{"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"a": 2}'}}],
    "ShareGPT": [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'}],
}


@pytest.mark.parametrize("spelt", SPELT)
def test_calls_of_tools_and_their_results(spelt):
    result = {"from": "observation", "value": "4"} if spelt == "ShareGPT" else {"role": "tool", "content": 4, "tool_call_id": "c1"}
    found = read({"messages": [ASKED, *SPELT[spelt], result, {"role": "assistant", "content": "Four."}]})
    first, second = found.exchanges
    assert (first.instruction, first.response, json.loads(first.calls)[0]["function"]) == ("2+2?", "", CALL[0]["function"])
    assert (second.instruction, second.response, json.loads(second.asked)[0]["content"]) == ("", "Four.", "4")
    assert found.unread == ()


# ---- what is not read ----


def test_other_fields_are_named_also_inside_messages():
    record = conversation(
        {"name": "Bob", "weight": 1}, {"name": "Bob", "refusal": None}, id=0, source="web", history=[], note=None, tags=[]
    )
    assert read(record).unread == ("id", "source", "messages[].name")


def test_the_summary_groups_them_by_rows():
    rows = [ALPACA | {"id": n, "source": "web", "history": [["q", "a"]]} | ({"score": 3} if n == 0 else {}) for n in range(2000)]
    examples = [Example(exchanges=p.exchanges, history=p.history, unread=p.unread) for p in map(read, rows)]
    zero = dict.fromkeys(("rows", "bad", "dropped", "overlapping", "duplicates", "train", "validation", "repeats", "cut"), 0)
    assert SourceCounts(path="a", role="train", bad_rows=(), **zero, **fields_of(examples)).fields() == [
        "2,000 rows with history: its exchanges come before the question, and their answers are scored too",
        "fields not read: id, source (2,000 rows each); score (1 row)",
    ]
