"""What a recipe may say: a model for every section, with the keys, ranges and defaults.

Keys are written with dashes. Whatever is not listed here is refused, and null means "not given". What follows from
several sections together is checked where rows are made of them, in expand.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from megatron_btx.common.ensembles import NEAREST, WEIGHTINGS
from megatron_btx.common.refusals import RefusedKeyError
from megatron_btx.common.routing_methods import Balancing
from megatron_btx.data.domains import SPLITS, Domain, Shares
from megatron_btx.mixing.options import RESULT
from megatron_btx.recipe.cluster import ClusterSection
from megatron_btx.recipe.flags import FlagValue
from megatron_btx.recipe.options import with_options
from megatron_btx.recipe.section import Section
from megatron_btx.recipe.values import (
    Blend,
    Datasets,
    DomainName,
    Model,
    Processes,
    RandomSeed,
    RunName,
    Texts,
    TokenizerFlags,
    Tokens,
    VariantName,
    WrittenFlags,
    WrittenValue,
    check_names_differ,
)


def _fill_empty(named: object) -> object:
    """A section that says nothing (``top2:``) is there all the same."""
    if not isinstance(named, dict):
        return named
    return {name: {} if settings is None else settings for name, settings in named.items()}


def _as_text_section(text: object) -> object:
    """``text: PATH`` and ``text: [PATH, ...]`` are files that are split by shares."""
    if isinstance(text, str):
        return {"files": [text]}
    if isinstance(text, list):
        return {"files": text}
    return text


def _check_train(shares: dict[str, float]) -> dict[str, float]:
    if "train" not in shares:
        raise RefusedKeyError("train", "missing; it has no default, so give it")
    return shares


TrainingShares = Annotated[Shares, AfterValidator(_check_train)]
"""How the documents of a text are split."""


def _check_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"found {seeds!r}, expected every seed once")
    return seeds


Seeds = Annotated[list[RandomSeed], Field(min_length=1), AfterValidator(_check_seeds)]
"""Each draws the routers of a mix and shuffles the data of its finetuning."""


def _as_export_section(export: object) -> object:
    """``export: true`` takes every default."""
    if export is True:
        return {}
    return None if export is False else export


class LayoutSection(Section):
    """How one stage is spread over this machine; all but the first two are Megatron's flags."""

    processes: Processes = 1
    threads: Processes = 1
    """OMP_NUM_THREADS of each process."""
    tensor_model_parallel_size: WrittenValue = None
    pipeline_model_parallel_size: WrittenValue = None
    context_parallel_size: WrittenValue = None
    expert_model_parallel_size: WrittenValue = None
    expert_tensor_parallel_size: WrittenValue = None
    num_layers_per_virtual_pipeline_stage: WrittenValue = None
    num_virtual_stages_per_pipeline_rank: WrittenValue = None
    sequence_parallel: WrittenValue = None
    use_distributed_optimizer: WrittenValue = None

    def flags(self) -> dict[str, FlagValue]:
        """What is given of Megatron's."""
        return self.model_dump(by_alias=True, exclude_unset=True, exclude={"processes", "threads"})


class SettingsSection(Section):
    """Layout and flags of a stage."""

    layout: LayoutSection = LayoutSection()
    megatron: WrittenFlags = {}
    """Flags of this stage alone."""


@with_options(RESULT)
class TrainingSection(SettingsSection):
    """A stage that trains, or a checkpoint that takes its place, with the options of its import."""

    from_: Model | None = None
    blend: Blend = {}
    tokens: Tokens | None = None
    """The stage's budget, rounded to whole batches."""


class RoutingSection(Section):
    """How a mixture routes; see routing.py."""

    routing: str | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    load_balancing: Balancing | None = None


class MixSection(RoutingSection):
    """The mixing stage, or a mixed checkpoint that takes its place; expand.py adds the converter's options."""

    from_: Model | None = None
    experts: list[str] | None = None
    """Names in the order of the mixture, ``seed`` among them (default: every expert, then the seed)."""
    router_seed: Annotated[int, Field(ge=0)] | None = None
    """Draws the routers (default: random-seed)."""
    megatron: WrittenFlags = {}
    """Flags of the mixture, for finetuning and evaluation alike."""


class OneStageSection(Section):
    """A baseline that one stage trains as the mixture is finetuned."""

    layout: LayoutSection | None = None
    """(default: that of finetune, without experts)"""
    megatron: WrittenFlags = {}
    """(default: those of finetune, without what only mixtures have)"""


class DataMatchedSection(Section):
    """A baseline that is trained on what the mixture saw of each domain: its experts' data, then finetuning's."""

    domains: SettingsSection | None = None
    """(default: as finetune, of a dense model without what only mixtures have)"""
    mixture: SettingsSection | None = None
    """(default: likewise)"""


class MergeSection(Section):
    """A baseline of which no model is made: the experts' distributions are averaged (Branch-Train-Merge)."""

    top_k: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 2]
    """Experts used at once; a row for each number."""
    weights: Annotated[list[str], Field(min_length=1)] = [NEAREST]
    """A row for each way of weighing them, as --btx-btm-weights has it."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        known = [name for name, row in WEIGHTINGS.items() if not row.needs_prior]
        for name in self.weights:
            if name not in known:
                raise RefusedKeyError("weights", f"found {name!r}, expected some of: {', '.join(known)}")
        return self


class EvaluateSection(SettingsSection):
    """Loss per domain of every model."""

    split: Literal["valid", "test"] = "valid"
    tokens: Tokens
    """Per domain."""


class VariantSection(RoutingSection):
    """What differs from mix and finetune."""

    layout: LayoutSection | None = None
    """(default: that of finetune)"""

    freeze: list[str] | None = None
    """Groups of parameters; another spelling of megatron: {btx-freeze: ...}, and an empty list takes that back."""
    tokens: Tokens | None = None
    """Of its finetuning (default: as finetune)."""
    megatron: WrittenFlags = {}
    seeds: Seeds | None = None
    """(default: those of the ablation)"""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.freeze is not None and "btx-freeze" in self.megatron:
            raise RefusedKeyError("freeze", "megatron.btx-freeze says it a second time; leave one of them out")
        return self

    def freeze_flags(self) -> dict[str, FlagValue]:
        """What ``freeze: [...]`` says; an empty list takes back what finetune says."""
        if self.freeze is None:
            return {}
        return {"btx-freeze": tuple(self.freeze) or False}


class AblationSection(Section):
    """Variants of finetuning from the same experts."""

    layout: LayoutSection = LayoutSection()
    """Of the experts' evaluation; a variant's finetuning has a layout of its own, or that of finetune."""

    seeds: Seeds | None = None
    """Of every variant that has none of its own."""
    split: Literal["valid", "test"] = "valid"
    tokens: Tokens = 65_536
    """Per domain, measured after the last step."""
    variants: Annotated[
        dict[VariantName, VariantSection], BeforeValidator(_fill_empty), AfterValidator(check_names_differ)
    ] = {}

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if not self.variants:
            expected = "names with what differs from mix and finetune, as soft: {routing: soft}"
            raise RefusedKeyError("variants", f"missing, expected {expected}")
        if self.seeds is None and any(variant.seeds is None for variant in self.variants.values()):
            raise RefusedKeyError("seeds", "missing, expected a list of whole numbers above zero, as [1, 2, 3]")
        return self

    def evaluation(self) -> EvaluateSection:
        """How every variant is measured after its last step, and the experts before."""
        return EvaluateSection(split=self.split, tokens=self.tokens, layout=self.layout)


class TextSection(Section):
    """Text of one domain: files that are split by shares, or files for each split."""

    files: Texts | None = None
    train: Texts | None = None
    valid: Texts | None = None
    test: Texts | None = None
    json_key: str | None = None
    """Of a record's text, or the column of a Parquet file (default: text)."""
    on_bad_record: Literal["stop", "skip"] | None = None
    """skip: records that cannot be read are counted and left out (default: stop)."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.files is None and self.train is None:
            raise ValueError("found no files; expected text: [files or folders], or text: {train: [...], ...}")
        if self.files is not None and (self.train or self.valid or self.test):
            raise ValueError("found files beside those of a split; expected one list, or a list for every split")
        return self


class DomainSection(Section):
    """One domain: datasets that are given, or text that the run makes datasets of."""

    train: Datasets | None = None
    valid: Datasets | None = None
    test: Datasets | None = None
    text: Annotated[TextSection | None, BeforeValidator(_as_text_section)] = None
    split: TrainingShares | None = None
    """Of text (default: data.split)."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.text is not None and self.given_splits():
            raise RefusedKeyError("text", "found beside .bin/.idx files of the same domain; leave one of them out")
        if self.text is not None and self.split is not None and self.text.files is None:
            raise RefusedKeyError("split", "found beside files for every split; leave it out")
        if self.text is None and self.split is not None:
            raise RefusedKeyError("split", "only for text, of which the run makes datasets; leave it out")
        if self.text is None and self.train is None:
            expected = "a list of prefixes of .bin/.idx files; or text: [files or folders]"
            raise RefusedKeyError("train", f"missing, expected {expected}")
        return self

    def given_splits(self) -> dict[str, Any]:
        """Split -> the datasets that are given for it."""
        names: set[str] = set(SPLITS)
        return self.model_dump(include=names, exclude_none=True)


class DataSection(Section):
    """Domains whose datasets or texts are given."""

    workers: Processes = 2
    seed: Annotated[int, Field(ge=0)] = 1234
    """Draws which documents of a text go to which split."""
    tokenizer: TokenizerFlags = {}
    """Megatron's tokenizer flags, of given data (default: the given seed's own tokenizer)."""
    split: TrainingShares | None = None
    """Of all texts that state none of their own."""
    domains: Annotated[
        dict[DomainName, DomainSection], BeforeValidator(_fill_empty), AfterValidator(check_names_differ)
    ] = {}

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if not self.domains:
            expected = "a mapping of domains: NAME: {text: [files or folders]}"
            raise RefusedKeyError("domains", f"found none, expected {expected}")
        for name, domain in self.domains.items():
            if domain.text is not None and domain.text.files is not None and not (domain.split or self.split):
                expected = "shares of the documents, as {train: 0.98, valid: 0.01, test: 0.01}"
                raise RefusedKeyError(f"domains.{name}.split", f"missing, expected {expected}")
        if any(domain.text is not None for domain in self.domains.values()):
            return self
        if self.split is not None:
            raise RefusedKeyError("split", "found beside .bin/.idx files, which are split already; leave it out")
        for key in ("workers", "seed"):
            if self.says(key):
                raise RefusedKeyError(key, "only for text, of which the run makes datasets; leave it out")
        return self

    def texts(self) -> dict[str, Domain]:
        """Domain -> its text, as the program that makes datasets takes it."""
        found = {}
        for name, domain in self.domains.items():
            text, shares = domain.text, domain.split or self.split
            if text is None:
                continue
            said = text.model_dump(by_alias=True, exclude_none=True)
            if text.files is not None and shares is not None:
                said |= {"text": said.pop("files"), "shares": shares}
            found[name] = Domain.model_validate(said)
        return found


@with_options(RESULT)
class ExportSection(Section):
    """The finetuned mixture in another form, read back and compared."""

    format: Literal["hf"] = "hf"
    """A Hugging Face model folder with its tokenizer."""


class RecipeSection(Section):
    """A whole recipe."""

    name: RunName
    """Of the run's folder (default: the file's)."""
    random_seed: RandomSeed = 1234
    """Of every training stage, and of the mix's routers unless mix.router-seed is given."""
    data: DataSection = Field(default={}, validate_default=True)
    model: WrittenFlags = {}
    """Flags of the dense model, for every stage (default: those of the given seed, else of the first given expert)."""
    training: WrittenFlags = {}
    """Flags of every stage that trains or evaluates."""
    domains: list[str] | None = None
    """Those that are evaluated, in this order (default: all)."""
    seed: TrainingSection = TrainingSection()
    experts: Annotated[dict[str, TrainingSection], BeforeValidator(_fill_empty)] = {}
    """Home domain -> the expert."""
    mix: MixSection | None = None
    finetune: TrainingSection | None = None
    baselines: Section = Section()
    """What the mixture is compared with: a key for each of :data:`megatron_btx.recipe.expand.BASELINES`."""
    evaluate: EvaluateSection | None = None
    export: Annotated[ExportSection | None, BeforeValidator(_as_export_section)] = None
    """Of the finetuned mixture; true for every default."""
    ablation: AblationSection | None = None
    """Variants of finetuning; they take the place of the one finetuning stage."""
    cluster: ClusterSection = ClusterSection()
    """What btx submit asks of Slurm; btx run takes no notice of it."""
