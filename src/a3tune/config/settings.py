"""The `RunConfig` tree: every setting of a run, with its type, range and default.

Knows names; not what the settings do, nor how they are written (`reading.py`). Relative paths, in a YAML file too, are
relative to the current directory, as on the command line. Defaults are the paper's (Appendix C.1) where it gives one.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import ConfigDict

from a3tune.config.ranges import (
    Cosine,
    Count,
    Device,
    Dropout,
    FilePath,
    Fillings,
    Fraction,
    GivenHeads,
    Heads,
    Names,
    Natural,
    NonNegative,
    Options,
    Positive,
    Seed,
    Share,
    Switch,
    Text,
)


class _Section:
    """A group of settings; an unknown one is an error."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class ModelConfig(_Section):
    path: Text = "tiny"
    """`tiny` (shipped in the package), a folder, or `owner/name` or `owner/name@revision` of the Hugging Face Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on CUDA, float32 elsewhere."""
    device: Device = "auto"
    """auto, cpu, mps, cuda or cuda:N."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Of the frozen weights (QLoRA); needs the extra `quantize`."""
    device_map: Text | None = None
    """`auto` spreads a model over all devices; null puts it on `device`."""


@dataclass(frozen=True, slots=True)
class DataConfig(_Section):
    """Rows in the public format, as JSONL, as parquet or as a Hugging Face data set on disk (`data/rows.py`)."""

    train: FilePath | None = None
    validation: FilePath | None = None
    """What is measured while it trains, if `training.eval_steps` asks for it."""
    test: FilePath | None = None


@dataclass(frozen=True, slots=True)
class LabelsConfig(_Section):
    """Where to look (section 4.1)."""

    source: Literal["weak", "truth", "none"] = "weak"
    """`weak`: proposed and ranked. `truth`: the data set's own regions. `none`: no alignment, whatever its weight."""
    proposer: Text = "superpixels"
    """Name in the registry of `labels/propose`: superpixels, regions, sam (SAM, SAM-HQ, SAM 2), medsam, litemedsam."""
    weights: FilePath | None = None
    """Of the proposer, where it has any: a folder, or a name on the Hugging Face Hub, `owner/name[@revision]`."""
    proposal: Options = field(default_factory=dict)
    """The proposer's own settings, in place of its defaults."""
    ranker: Text = "tiny"
    """`tiny` (shipped in the package), or a BiomedCLIP, CLIP or SigLIP: a folder, or a name on the Hub."""
    visual_prompt: Text = "dim"
    """How a segment is shown to the ranker: a name in the registry of `labels/rank`."""
    query: Text = "{question}"
    """What the ranker reads. `{question}` is the prompt, other names in braces are keys of a sample's `meta`."""
    top_k: Count = 4
    """K of Eq. 3, the segments kept per sample: >= 1."""
    threshold: Cosine | None = None
    """Segments less similar to the query than this are dropped as well: -1 to 1."""
    store: FilePath | None = None
    """Folder of the label store; null keeps it inside the output folder."""
    workers: Count = 1
    """Processes that label images: >= 1."""
    backend: Literal["process", "ray"] = "process"
    """Where they are: `process`, on this machine; `ray`, in the Ray cluster at RAY_ADDRESS (extra `ray`)."""

    def __post_init__(self) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.query) if name is not None]
        except ValueError as error:
            raise ValueError(f"query {self.query!r} is no template ({error}); write a literal brace twice") from None
        if not all(names):
            raise ValueError(f"query {self.query!r} has braces without a name in them; expected such as '{{question}}'")


LABEL_MAKING = ("proposer", "weights", "proposal", "ranker", "visual_prompt", "query")
"""Settings of `LabelsConfig` that segments and similarities depend on; the others say how they are used or kept."""


@dataclass(frozen=True, slots=True)
class AdapterConfig(_Section):
    """What is trained (section 4.2.1)."""

    kind: Literal["a3moe", "lora"] = "a3moe"
    """`lora`: plain LoRA on all linear modules of the language model, without experts."""
    rank: Count = 64
    """Of the LoRA matrices: >= 1."""
    alpha: Count = 16
    """LoRA's scale is alpha / rank: >= 1."""
    dropout: Dropout = 0.0
    """On the adapters' input: >= 0, < 1."""
    expert_rank: Count = 16
    """r of one expert: >= 1."""
    expert_alpha: Count = 8
    """An expert's scale is expert_alpha / expert_rank: >= 1."""
    query_experts: Natural = 4
    """O_q of Eq. 5: >= 0; 0 leaves Q-MoE out, plain LoRA in its place."""
    key_experts: Natural = 8
    """O_k of Eq. 7: >= 0; 0 leaves K-MoE out, plain LoRA in its place."""
    top_experts: Count = 2
    """B of Eq. 7, the experts used per image token: >= 1, <= key_experts."""
    router_hidden: Count = 64
    """Hidden width of the routers' MLP (Eq. 4, 6): >= 1."""

    def __post_init__(self) -> None:
        if 0 < self.key_experts < self.top_experts:
            raise ValueError(
                f"top_experts is {self.top_experts} but there are only {self.key_experts} key_experts; "
                "lower top_experts or raise key_experts"
            )


EXPERTS = ("expert_rank", "expert_alpha", "query_experts", "key_experts", "top_experts", "router_hidden")
"""Settings of `AdapterConfig` that plain LoRA has no use for."""


@dataclass(frozen=True, slots=True)
class AlignmentConfig(_Section):
    """How attention is pulled to the regions (sections 4.2.2 and 4.2.3)."""

    weight: NonNegative = 3.0
    """Lambda of Eq. 12: >= 0; Table 7 has .02 to .12. The default is what helped answers where that could be seen
    (docs/results/marks.md). Eq. 10 is a sum over segments: one region of the truth pulls a quarter as hard as four
    weak labels.
    """
    until: Fraction | None = 0.5
    """Share of the training in which lambda falls to 0, along half a cosine: > 0, <= 1. Labels lead at first, and the
    answers have the last word (docs/results/marks.md). null: lambda stays as it is, as the paper's does.
    """
    heads: Heads = 0.5
    """R of Eq. 9: a count >= 1, or a share of all heads, as `12.5%` (all: `100%`) or as a number > 0 and < 1.

    The paper has 128 of 1,024. With so few the others are free to look elsewhere, and answers rest on what they see
    (docs/results/marks.md).
    """
    head_selection: Literal["batch", "running", "fixed"] = "batch"
    """Ratios that choose the heads: this batch's (the paper's), their running average, or a calibration pass's."""
    rows: Literal["after_image", "answer", "prompt"] = "after_image"
    """Text rows whose attention is averaged."""
    variant: Literal["paper", "code"] = "paper"
    """Eq. 10 as printed, or as in the published code (a ratio per text row, then the mean of squares)."""
    membership: Fraction = 0.5
    """Share of an image token's box that a region must cover to hold the token: > 0, <= 1."""


@dataclass(frozen=True, slots=True)
class TrainingConfig(_Section):
    epochs: Positive = 3.0
    """> 0."""
    max_steps: Count | None = None
    """Optimiser steps, in place of epochs: >= 1."""
    batch_size: Count = 8
    """Samples per device and forward pass: >= 1."""
    accumulation: Count = 1
    """Forward passes per optimiser step: >= 1."""
    learning_rate: Positive = 2e-4
    """Peak: > 0."""
    warmup: Share = 0.03
    """Share of all steps: 0 to 1."""
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """>= 0; 0 does not clip."""
    bf16: Literal["auto"] | Switch = "auto"
    """Mixed precision; `auto`: where the device has it."""
    seed: Seed = 0
    """Of weights, order and dropout: >= 0."""
    save_steps: Count = 500
    """Optimiser steps between checkpoints: >= 1."""
    log_steps: Count = 10
    """Optimiser steps between lines of `metrics.jsonl`: >= 1."""
    workers: Natural = 0
    """Processes that load data; 0 loads in the main one."""
    activation_checkpointing: Switch = False
    """Recompute activations in the backward pass: less memory, more time."""
    load_balance: NonNegative = 0.0
    """Weight of the routers' load-balance term: >= 0; the paper has none. Plain LoRA has no routers, and no term."""
    eval_steps: Natural = 0
    """Optimiser steps between evaluations on `data.validation`, the last step's besides: >= 0; 0 makes none."""
    eval_samples: Count = 64
    """Validation rows that are evaluated, always the same ones, drawn once: >= 1."""
    keep_best: Text | None = None
    """Score of the validation whose best adapter is kept too: loss, loss_llm, loss_align or a metric (closed_accuracy).
    """
    patience: Count | None = None
    """Evaluations without a better score after which the training ends: >= 1; null trains to the end."""
    report_to: Names = ()
    """Trackers that the log goes to: tensorboard, wandb, trackio, mlflow, ..., as `transformers` names them."""

    def __post_init__(self) -> None:
        if self.keep_best is not None and not self.eval_steps:
            raise ValueError(f"keep_best is {self.keep_best}, but eval_steps is 0: nothing is measured; set eval_steps")
        if self.patience is not None and self.keep_best is None:
            raise ValueError(f"patience is {self.patience}, but keep_best names no score to wait for; set keep_best")


@dataclass(frozen=True, slots=True)
class EvaluationConfig(_Section):
    batch_size: Count = 16
    """Samples per forward pass: >= 1."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens: >= 1."""
    decode: Text = "greedy"
    """Decoding method: sampling, greedy, beam, nucleus, vcd, dola, opera, avisc, m3id, damro, pai, controlmllm."""
    decoding: Options = field(default_factory=dict)
    """The method's own settings, in place of the published ones."""
    strategy: Text | None = None
    """greedy, beam, nucleus or sampling, in place of the method's own way to choose a token."""
    seed: Seed = 0
    """Of sampling and noise."""
    weights: Options = field(default_factory=dict)
    """Folders of what report metrics need: nltk_data, bertscore, chexbert, radgraph, ratescore."""
    tau: Fraction = 0.15
    """Coverage's threshold on the normalised map (Appendix D.2): > 0, <= 1."""
    normalisation: Literal["max", "sum", "min-max"] = "max"
    """Of the map, before Coverage and Intensity; the paper does not name its own."""
    heads: GivenHeads = None
    """Heads whose attention is averaged, as `alignment.heads`; null: those of the training."""
    rows: Literal["after_image", "answer", "prompt"] | None = None
    """Text rows whose attention is averaged, as `alignment.rows`; null: those of the training."""
    occlude: Switch = False
    """Ask again with the region hidden, with all but the region hidden, and with as much hidden elsewhere."""
    fillings: Fillings = ("mean", "blur", "noise")
    """What hidden pixels are replaced by, each in turn: mean, blur, noise."""
    dilation: Share = 0.02
    """How far around a region is hidden with it, in lengths of the image's longer side: 0 to 1."""

    def over(self, alignment: AlignmentConfig) -> "EvaluationConfig":
        """The same, measured over the heads and rows of a training where none are given."""
        heads = alignment.heads if self.heads is None else self.heads
        return replace(self, heads=heads, rows=self.rows or alignment.rows)


@dataclass(frozen=True, slots=True)
class RunConfig(_Section):
    """All settings of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: FilePath = Path("runs/a3tune")
    """The run folder."""

    @property
    def label_store(self) -> Path:
        """Folder of the label store."""
        return self.labels.store or self.output / "labels"

    @property
    def active_alignment(self) -> AlignmentConfig:
        """The alignment that a training makes: none without labels, whatever its weight."""
        return replace(self.alignment, weight=0.0) if self.labels.source == "none" else self.alignment

    @property
    def active_balance(self) -> float:
        """Weight of the load-balance term; 0 where nothing is routed."""
        routed = self.adapter.kind == "a3moe" and bool(self.adapter.query_experts or self.adapter.key_experts)
        return self.training.load_balance if routed else 0.0

    @property
    def active_evaluation(self) -> EvaluationConfig:
        """The evaluation, over the heads and rows of the training where it names none."""
        return self.evaluation.over(self.alignment)
