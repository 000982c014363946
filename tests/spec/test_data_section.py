"""What may be written of data of other shapes: columns, markers of plain text, prompts of one's own."""

from typing import Any

import pytest

from loratune.data.sources import DataRecipe
from loratune.errors import SpecError
from loratune.spec import StudySpec


def load(**data: Any) -> StudySpec:
    return StudySpec.load(base={"model": "m", "data": {"train": "a.json", "validation_fraction": 0.1, **data}})


def test_columns_prompts_and_markers_reach_the_recipe() -> None:
    sources = [{"path": "b.csv", "columns": {"output": "answer"}}]
    spec = load(train=sources, columns={"instruction": "question"}, prompt="Q: {{ instruction }}\nA: ")
    assert StudySpec.load(base=dict(spec.model_dump(mode="json"))) == spec
    recipe = DataRecipe.from_plain(spec.data_recipe_dict())
    assert (recipe.columns, recipe.train[0].columns, recipe.on_bad_rows) == ({"instruction": "question"}, {"output": "answer"}, "auto")
    assert recipe.prompt == "Q: {{ instruction }}\nA: "
    assert load(prompt="mine.jinja").data.prompt == "mine.jinja"
    assert load(response_marker="### A:", instruction_marker="### Q:").data.response_marker == "### A:"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"instructon": "q"}}, "data.columns.instructon: not a field of a row; did you mean 'instruction'?"),
        ({"columns": {"output": ""}}, "data.columns.output: got ''; needed: text"),
        ({"train": {"path": "a", "columns": {"x": "y"}}}, "data.train.0.columns.x: not a field of a row; these are: instruction, input"),
        ({"prompt": "vicuna"}, "data.prompt: got 'vicuna'; allowed: a Jinja template, its .jinja file, or auto, alpaca, chat"),
        ({"instruction_marker": "Q:"}, "data.instruction_marker: needs response_marker"),
        ({"response_marker": "A:", "prompt": "chat"}, "data.prompt: with response_marker the rows are plain text"),
        ({"on_bad_rows": "few"}, "data.on_bad_rows: got 'few'; allowed: auto, error, skip"),
    ],
)
def test_mistakes(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load(**data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
