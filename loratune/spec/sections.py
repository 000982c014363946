"""The sections of a study's description. Each field is followed by its meaning and unit.

These descriptions are the documentation: `loratune init` writes them into its YAML, `json_schema` hands
them to editors. Types are taken literally ("2" is not 2); unknown fields are refused.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from loratune.errors import SpecError
from loratune.plugs import EXECUTORS, SAMPLERS, SCHEDULES, TRACKERS, Registry
from loratune.spec.hyperparameters import TARGET_MODULES
from loratune.spec.validation_errors import MistakesError, not_allowed
from loratune.system.names import nearest

_TRIALS = 100  # of the published study
_HELD_OUT = 0.1  # of the training data, where nobody says what validates


class Section(BaseModel):
    """A part of the description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True
    )  # built on first use: a fast import


class OneOf:
    """Of a field: the name of a plug."""

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self._registry.names)}

    def _check(self, given: Any) -> Any:
        if not isinstance(given, str) or given not in self._registry:
            raise ValueError(not_allowed(given, self._registry.names))
        try:
            self._registry[given]
        except SpecError as error:  # a broken plug of another package
            raise ValueError(str(error)) from error
        return given


def with_options(section: type[BaseModel], given: Any, among: Callable[[str], bool] = lambda key: True) -> Any:
    """A plug's options, which may stand beside its name, gathered in `options`; `among` tells which names are options."""
    if not isinstance(given, Mapping):
        return {"name": given} if isinstance(given, str) else given
    own = {key: value for key, value in given.items() if key not in section.model_fields and among(str(key))}
    options = given.get("options") or {}
    if not own or not isinstance(options, Mapping):
        return given
    return {**{key: value for key, value in given.items() if key not in own}, "options": {**options, **own}}


def _option_of(registry: Registry[Any], given: Any) -> Callable[[str], bool]:
    """Whether a name is an option of the plug that `given` names."""
    name = given.get("name") if isinstance(given, Mapping) else None
    return lambda key: isinstance(name, str) and name in registry and key in registry.options(name)


class Model(Section):
    """The base model that the adapters are trained on."""

    name_or_path: str = Field(min_length=1, description="local folder or Hugging Face hub id of the base model")
    revision: str | None = Field(None, description="hub branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="data type of the frozen weights; auto: bfloat16 on GPU, float32 on CPU"
    )
    load_in_4bit: bool = Field(False, description="store the frozen weights as 4-bit NF4 (bitsandbytes)")
    attn_implementation: str | None = Field(
        None, description="attention kernel (sdpa, eager, flash_attention_2); null: Transformers chooses"
    )
    trust_remote_code: bool = Field(False, description="allow Python code that ships with the model")


ROW_FIELDS = (
    *("instruction", "input", "output", "response", "context", "prompt", "completion", "text", "messages", "conversations"),
    *("system", "history", "tools", "reasoning_content", "weight", "category"),
)
"""Fields of a row that a column of another name may stand for."""


def _known_fields(given: dict[str, str]) -> dict[str, str]:
    unknown = [name for name in given if name not in ROW_FIELDS]
    if unknown:
        raise MistakesError(
            ((name,), f"not a field of a row{nearest(name, ROW_FIELDS) or '; these are: ' + ', '.join(ROW_FIELDS)}") for name in unknown
        )
    return given


Columns = Annotated[dict[str, Annotated[str, Field(min_length=1)]], AfterValidator(_known_fields)]


class Source(Section):
    """A file or folder of instruction data."""

    path: str = Field(min_length=1, description="JSON, JSONL, CSV or Parquet file, folder of them, or hub id")
    format: Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "prompt_completion", "text"] = Field(
        "auto", description="row format; auto: detected from the field names"
    )
    split: str | None = Field(None, description="split of a hub data set or folder; null: the only split, or train")
    weight: float | None = Field(None, gt=0, description="its share of train_count and validation_count; null: proportional to its rows")
    count: int | None = Field(
        None, ge=1, description="examples to draw from it (of a training source: for training); null: all, or its share"
    )
    validation_count: int | None = Field(None, ge=1, description="examples of this training source held out for validation")
    columns: Columns = Field(default_factory=dict, description="as data.columns, for this source alone")


Sources = Annotated[tuple[Source, ...], Field(strict=False)]


class Data(Section):
    """The instruction data, its split and its form."""

    train: Sources = Field(min_length=1, description="training sources: paths, or mappings with a path")
    validation: Sources = Field((), description="validation sources, if validation data are in separate files")
    validation_fraction: float | None = Field(
        None, gt=0, lt=1, description="fraction of the training sources held out for validation; null: 0.1, if nothing else says what is"
    )
    train_count: int | None = Field(None, ge=1, description="total number of training examples; null: all of them")
    validation_count: int | None = Field(
        None, ge=1, description="total number of validation examples, held out or drawn from the validation sources"
    )
    columns: Columns = Field(
        default_factory=dict, description="columns of other names than a format's: {instruction: question, output: answer}"
    )
    prompt: str = Field(
        "auto",
        description="chat: the tokenizer's own template; alpaca: Stanford's; auto: chat where the tokenizer has one, else alpaca; "
        "or a Jinja template, its text or its .jinja file, of instruction, input, system or of messages",
    )
    response_marker: str = Field(
        "", description="of plain text (field text): words behind which an answer begins, '### Response:'; what is before is not scored"
    )
    instruction_marker: str = Field(
        "", description="of plain text with several answers: words before a question, where an answer ends; empty: the last answer alone"
    )
    score_reasoning: bool = Field(True, description="count an answer's thinking part (reasoning_content, <think>) in the loss")
    max_length: int = Field(512, ge=2, description="tokens of prompt and response together; longer examples are truncated")
    on_bad_rows: Literal["auto", "error", "skip"] = Field(
        "auto", description="unusable rows: auto: skip up to 1 % of a source, name all where there are more; error: stop at one; skip: any"
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _plain_paths(cls, given: Any) -> Any:
        sources = [given] if isinstance(given, str | Mapping) else given
        if not isinstance(sources, list | tuple):
            return sources
        return [{"path": source} if isinstance(source, str) else source for source in sources]

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, given: str) -> str:
        known = ("auto", "alpaca", "chat")
        if given not in known and not ("{{" in given or "{%" in given or given.endswith((".jinja", ".jinja2", ".j2"))):
            raise ValueError(not_allowed(given, known).replace("allowed: ", "allowed: a Jinja template, its .jinja file, or "))
        return given

    @model_validator(mode="after")
    def _markers(self) -> Self:
        if self.instruction_marker and not self.response_marker:
            raise MistakesError(((("instruction_marker",), "needs response_marker, the words behind which an answer begins"),))
        if self.response_marker and self.prompt != "auto":
            raise MistakesError(
                ((("prompt",), "with response_marker the rows are plain text, which carries its own prompt; leave prompt out"),)
            )
        return self

    @model_validator(mode="after")
    def _validates(self) -> Self:
        given = {
            "validation (sources)": bool(self.validation),
            "validation_fraction": self.validation_fraction is not None,
            "validation_count": self.validation_count is not None and not self.validation,  # else it draws from the sources
            "a training source's validation_count": any(source.validation_count for source in self.train),
        }
        ways = [way for way, used in given.items() if used]
        if not ways:
            object.__setattr__(self, "validation_fraction", _HELD_OUT)  # not among `model_fields_set`: nobody wrote it
        if len(ways) > 1 and ways != list(given)[2:]:  # a source may have its own part of validation_count
            raise ValueError(f"validation data comes from one place; given: {', '.join(ways)}")
        if any(source.validation_count for source in self.validation):
            raise ValueError("validation_count belongs to training sources; a validation source takes count")
        for name, sources in (("train", self.train), ("validation", self.validation)):
            if len({source.weight is None for source in sources}) > 1:
                raise ValueError(f"{name}: give every source a weight, or none")
        return self

    @property
    def holds_out_by_default(self) -> bool:
        """Whether the validation data are a tenth of the training data because nobody said what they are."""
        return self.validation_fraction is not None and "validation_fraction" not in self.model_fields_set


class Training(Section):
    """How every trial is trained; values that are also searched apply only where they are not searched."""

    epochs: float = Field(2.0, gt=0, description="passes over the training set")
    batch_size: int = Field(128, ge=1, description="examples per optimiser step, over all devices")
    micro_batch_size: int = Field(4, ge=1, description="examples per forward pass and device; affects memory and speed, never results")
    validation_batch_size: int = Field(8, ge=1, description="examples per forward pass in validation; likewise")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field("cosine", description="after linear warmup")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="fraction of the steps spent in warmup")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradient clipping: maximum norm of the adapter's gradient; null: no clipping"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW: decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment")
    tokens_per_pass: int | None = Field(
        None,
        ge=1,
        description="packed engine: tokens per forward pass; null: chosen for the device; affects memory and speed, never results",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    target_modules: str | tuple[str, ...] = Field(
        "qv", description="layers that get an adapter: qv, qkvo, mlp, all-linear, or a list of module names"
    )
    use_rslora: bool = Field(False, description="scale adapters by alpha / sqrt(r) instead of alpha / r")
    loraplus_lr_ratio: float = Field(1.0, gt=0, description="LoRA+: ratio of the learning rate of the B matrices to that of the A matrices")
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between crash checkpoints; null: a tenth of a run")
    validations: int = Field(1, ge=1, description="validations per run, evenly spaced, the last at its end; they make the learning curve")
    keep: Literal["last", "best"] = Field(
        "last",
        description="which point gives a trial's adapter and loss; last: the end of the run; best: the validation with the lowest loss",
    )
    report_to: Annotated[tuple[Annotated[str, OneOf(TRACKERS)], ...], Field(strict=False)] = Field(
        (), description=f"experiment trackers, each with a run per trial and one of the study: {' | '.join(TRACKERS.builtin)}"
    )
    engine: Literal["hf", "packed"] = Field(
        "packed",
        description="packed: many adapters together on one frozen base, if the model allows it; hf: Transformers' Trainer and PEFT",
    )
    slots: int | None = Field(
        None, ge=1, description="trials that one process trains together; null: chosen for the model, the data and the device"
    )
    devices_per_trial: int = Field(1, ge=1, description="GPUs that train one trial together")
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="none: each GPU of a trial holds the whole model; fsdp: a share of each layer, for models larger than one GPU"
    )

    @model_validator(mode="after")
    def _slots_need_packed(self) -> Self:
        if (self.slots or 1) > 1 and self.engine == "hf":
            raise MistakesError(((("slots",), f"got {self.slots}; engine hf trains one trial at a time; write engine: packed"),))
        if (self.slots or 1) > 1 and self.devices_per_trial > 1:
            raise MistakesError(((("slots",), f"got {self.slots}; a trial on several devices (devices_per_trial) has them to itself"),))
        if self.sharding == "fsdp" and self.devices_per_trial == 1:
            raise MistakesError(((("sharding",), "got 'fsdp'; there is nothing to share out with devices_per_trial: 1; write 2 or more"),))
        return self

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("target_modules", mode="before")
    @classmethod
    def _named_set(cls, given: Any) -> Any:
        if isinstance(given, list | tuple) and given and all(isinstance(name, str) and name for name in given):
            return tuple(given)
        if not isinstance(given, str) or given not in TARGET_MODULES:
            raise ValueError(not_allowed(given, TARGET_MODULES).replace("allowed: ", "allowed: a list of module names, or "))
        return given


class Sampler(Section):
    """Who proposes the hyperparameters."""

    name: Annotated[str, OneOf(SAMPLERS)] = Field("bracket", description=" | ".join(SAMPLERS.builtin))
    defaults_first: bool = Field(True, description="trial 0 takes the space's defaults; bracket begins there in any case")
    warm_start: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="of bracket: folders of earlier studies, whose best points sharpen the first guess"
    )
    options: dict[str, JsonValue] = Field(default_factory=dict, description="options of the sampler; may be written beside its name")

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            hints = {str(key): nearest(key, cls.model_fields, cutoff=0.8) for key in given if key not in cls.model_fields}
            if any(hints.values()):
                raise MistakesError(((key,), f"unknown field{hint}") for key, hint in hints.items() if hint)
        return with_options(cls, given)


class ScheduleSection(Section):
    """How far each trial is trained before it is compared."""

    name: Annotated[str, OneOf(SCHEDULES)] = Field("full", description=SCHEDULES.described)
    fidelity: Literal["steps", "budget"] = Field(
        "budget", description="halving: what a rung is; steps: a truncated long run, resumed; budget: a complete short run, restarted"
    )
    reduction_factor: int = Field(3, ge=2, description="halving: one in this many trials is promoted")
    min_resource: float = Field(1 / 9, gt=0, lt=1, description="halving: the first rung as a fraction of a full run, in (0, 1)")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="options of another package's schedule; may be written beside its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, given: Any) -> Any:
        return with_options(cls, given, _option_of(SCHEDULES, given))

    @field_validator("min_resource", mode="before")
    @classmethod
    def _fraction(cls, given: Any) -> Any:
        return float(Fraction(given)) if isinstance(given, str) and re.fullmatch(r"\d+/[1-9]\d*", given) else given


class Scoring(Section):
    """How benchmarks among the objectives and constraints are scored, after each trial that was trained to its end."""

    items: int = Field(
        200, ge=1, description="items of each benchmark, drawn with the seed, at most half; `loratune evaluate` excludes them"
    )
    data: str | None = Field(None, min_length=1, description="folder with the benchmarks' data; null: the Hugging Face hub")
    allow_code_execution: bool = Field(False, description="run, in a sandbox, the programs that models write (humaneval)")
    weaker_sandbox: bool = Field(False, description="accept a sandbox without namespaces where the system has none")


class ExecutorSection(Section):
    """Where trials are trained."""

    name: Annotated[str, OneOf(EXECUTORS)] = Field("local", description=EXECUTORS.described)
    workers: int | None = Field(
        None,
        ge=1,
        description="processes on a CPU; of ray: runs in flight, which may be more than devices; "
        "null: one per core, as memory and the number of trials allow, or per device",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: all GPUs, else the CPU")
    devices: Annotated[tuple[int, ...], Field(strict=False)] | None = Field(None, description="GPU indices; null: all visible GPUs")
    max_retries: int = Field(2, ge=0, description="retries of a crashed trial, each from its last checkpoint")
    hang_timeout: float | None = Field(None, gt=0, description="seconds without a heartbeat before a worker is restarted; null: never")
    threads: int | None = Field(None, ge=1, description="CPU threads per worker; null: the cores divided evenly")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="options of another package's executor; may be written beside its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, given: Any) -> Any:
        return with_options(cls, given, _option_of(EXECUTORS, given))


class Budget(Section):
    """When the study ends: whichever limit comes first."""

    trials: int | None = Field(None, ge=1, description="trials in all; null: 100")
    full_runs: float | None = Field(
        None,
        gt=0,
        description="training of all trials, in runs at the defaults to their end; the run that reaches it is finished; "
        "null: 3 for bracket unless trials is written, else no limit",
    )
    max_tokens: int | None = Field(None, ge=1, description="training tokens of all trials; null: no limit")
    max_hours: float | None = Field(None, gt=0, description="hours on the clock, over all starts; null: no limit")
    max_device_hours: float | None = Field(
        None, gt=0, description="hours of training, validation and scoring, summed over devices; null: no limit"
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description="device-hours times price_per_device_hour, in its currency; null: no limit. What runs at a limit of hours "
        "or cost is paused, and goes on with a larger one",
    )
    price_per_device_hour: float | None = Field(None, gt=0, description="price of an hour of one device; null: costs are not told")
    currency: str = Field("", description="unit of the price, as it is shown: EUR")

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.max_cost is not None and self.price_per_device_hour is None:
            raise MistakesError(((("max_cost",), f"got {self.max_cost:g}; needs price_per_device_hour, that of an hour of one device"),))
        return self

    @property
    def most(self) -> int:
        """Trials in all, at most."""
        return _TRIALS if self.trials is None else self.trials


class Output(Section):
    """What the study leaves behind."""

    folder: str | None = Field(None, description="folder of the study; null: runs/<name>")
    keep_adapters: int | None = Field(
        10, ge=0, description="number of best trials whose adapters are kept, besides trial 0 and the front; null: all"
    )
