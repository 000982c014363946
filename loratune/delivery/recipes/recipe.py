"""A recipe of another tool while it is turned into a study: each field is taken, without bearing here, or told as not carried over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratune.errors import SpecError

# Where results are written and how they are shown, what moves work between devices: nothing that decides what is learnt.
_WITHOUT_BEARING = (
    *("output_dir", "logging_", "save_", "saves_", "eval_s", "evals_", "evaluation_strategy", "overwrite_", "push_to_hub", "hub_"),
    *("wandb", "mlflow", "comet", "swanlab", "use_tensorboard", "trackio", "report_to", "run_name", "plot_loss", "log_", "debug"),
    *("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "preprocessing_num_workers", "dataloader_", "tokenized_path"),
    *("deepspeed", "fsdp", "ddp_", "tf32", "flash_optimum", "torch_compile", "gradient_checkpointing_kwargs", "do_train", "do_eval"),
    *("resume_from_checkpoint", "load_best", "per_device_eval_batch_size", "eval_batch_size", "group_by_length", "strict", "plugins"),
    *("liger", "enable_liger", "use_liger", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "pad_to_sequence_len", "special_tokens"),
    *("sample_packing", "eval_sample_packing", "packing", "neat_packing", "padding_free", "bnb_4bit_quant_type", "use_bnb_nested"),
)


@dataclass
class ForeignRecipe:
    """The fields of a file, taken one by one."""

    path: str
    given: dict[str, Any]
    study: dict[str, Any] = field(default_factory=lambda: {"model": {}, "data": {}, "training": {}, "search_space": {}})
    lost: list[str] = field(default_factory=list)  # what cannot be carried over, each with why
    notes: list[str] = field(default_factory=list)  # what was carried over otherwise than written
    _taken: set[str] = field(default_factory=set)

    def take(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that holds something, else the tool's own default."""
        self._taken.update(names)
        return next((self.given[name] for name in names if self.given.get(name) is not None), default)

    def lose(self, name: str, why: str) -> None:
        """Tell that the field, if it holds something, is not carried over."""
        value = self.given.get(name)
        self._taken.add(name)
        if value not in (None, False, [], {}, ""):
            shown = str(value)
            self.lost.append(f"{name}: {shown if len(shown) <= 60 else shown[:57] + '...'}  ({why})")

    def put(self, section: str, name: str, value: Any) -> None:
        """Set a field of the study, unless there is nothing to set."""
        if value is not None:
            self.study[section][name] = value

    def number(self, *names: str, default: float, kind: Callable[[Any], float] = float) -> Any:
        """A field as a number, which YAML 1.1 reads as text where it is written 2e-4. Raises SpecError."""
        value = self.take(*names, default=default)
        try:
            return kind(value)
        except (TypeError, ValueError):
            raise SpecError(f"{self.path}: {names[0]}: got {value!r}; needed: a number") from None

    def finish(self) -> None:
        """Tell what nobody took."""
        for name in self.given:
            if name not in self._taken and not str(name).startswith(_WITHOUT_BEARING):
                self.lose(name, "no counterpart")

    # ---- what the tools have in common ----

    def adapter(self, *, r: int, alpha: float, dropout: float, learning_rate: float) -> None:
        """The settings that are searched: the recipe's own are the first trial."""
        space = self.study["search_space"]
        ratio = float(f"{alpha / r:.6g}")
        space["lora_r"] = {"values": sorted({4, 8, 16, 32, 64, 128, 256, r}), "default": r}
        space["alpha_ratio"] = {"values": sorted({0.25, 0.5, 1.0, 2.0, ratio}), "default": ratio}
        space["lora_dropout"] = {"values": sorted({0.0, 0.05, 0.1, dropout}), "default": dropout}
        rate = {"low": min(1e-5, learning_rate), "high": max(1e-1, learning_rate), "log": True, "default": learning_rate}
        space["learning_rate"] = rate

    def batch(self, micro: int, accumulated: int) -> None:
        """Examples per optimiser step, on one device."""
        self.put("training", "micro_batch_size", micro)
        self.put("training", "batch_size", micro * accumulated)
        self.notes.append(f"training.batch_size {micro * accumulated} is that of one device; multiply it by the number of yours")

    def scheduler(self, name: str, *, default: str) -> None:
        known = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
        given = str(self.take(name, default=default))
        if given in known:
            self.put("training", "lr_scheduler_type", known[given])
        else:
            self.lose(name, "the schedules here are cosine, linear, constant; cosine is taken")

    def warmup(self) -> None:
        """A share of the steps; Transformers 5 writes it as warmup_steps below 1."""
        ratio, steps = self.take("warmup_ratio"), self.take("warmup_steps")
        if ratio is None and steps is not None and float(steps) >= 1:
            self.lose("warmup_steps", "a number of steps; write training.warmup_ratio, their share of all steps")
            return
        self.put("training", "warmup_ratio", float(ratio if ratio is not None else steps or 0.0))

    def optimizer(self, *names: str) -> None:
        given = str(self.take(*names, default="adamw_torch"))
        name = next((name for name in names if name in self.given), names[0])
        if not given.startswith("adamw_torch") and given not in ("adamw_hf", "OptimizerNames.ADAMW_TORCH"):
            self.lose(name, "AdamW in full precision is taken")
        for theirs, ours in (("adam_beta1", "adam_beta1"), ("adam_beta2", "adam_beta2"), ("adam_epsilon", "adam_epsilon")):
            if theirs in self.given:
                self.put("training", ours, self.number(theirs, default=0))
        self.put("training", "weight_decay", self.number("weight_decay", default=0.0))
        self.put("training", "max_grad_norm", self.number("max_grad_norm", default=1.0) or None)

    def precision(self) -> None:
        if self.take("bf16", "bfloat16") is True:
            self.put("model", "dtype", "bfloat16")
        elif self.take("fp16", "float16") is True:
            self.put("model", "dtype", "float16")

    def code_of_the_model(self) -> None:
        self.lose("trust_remote_code", "consent is yours to give: --model.trust_remote_code true")

    def targets(self, given: Any) -> None:
        """Module names, or one of the words for all linear layers; nothing: what PEFT takes for a LLaMA, query and value."""
        if given in ("all", "all-linear", ["all-linear"], "all_linear"):
            given = "all-linear"
        elif isinstance(given, str):
            given = [name.strip() for name in given.split(",") if name.strip()]
        self.put("training", "target_modules", given or "qv")

    def validation(self, size: Any) -> None:
        """A share, or above 1 a number of examples."""
        if size is not None and float(size) > 0:
            share = float(size)
            self.put("data", "validation_fraction" if share < 1 else "validation_count", share if share < 1 else int(share))
        elif not self.study["data"].get("validation"):
            self.put("data", "validation_fraction", 0.1)
            self.notes.append("the recipe has no validation data; a tenth of the training data is held out")


def only_lora(path: str, name: str, value: Any, wanted: tuple[Any, ...]) -> None:
    """Raises SpecError for a recipe that trains something else than LoRA adapters."""
    if value not in wanted:
        allowed = " or ".join(str(one).lower() for one in wanted)
        raise SpecError(f"{path}: {name}: got {value!r}; only recipes of LoRA make a study: {name}: {allowed}")


def mappings(given: Any) -> list[Mapping[str, Any]]:
    """A list of mappings, of which one may stand without its list."""
    several = given if isinstance(given, list) else [given] if given else []
    return [entry for entry in several if isinstance(entry, Mapping)]
