"""What a recipe may say: a model for every section, with the keys, ranges and defaults.

Keys are written with dashes. Whatever is not listed here is refused, and null means "not given". What follows from
several sections together is checked where the typed recipe is made of them, in reading.py.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from megatron_btx.pipeline.directory import is_set_aside
from megatron_btx.pipeline.recipe.flags import DERIVED_FLAGS, LAYOUT_FLAGS, FlagValue
from megatron_btx.pipeline.recipe.given import find_model
from megatron_btx.pipeline.recipe.refusals import RefusedKeyError
from megatron_btx.pipeline.recipe.schema import GENERALIST

LARGEST_SEED = 2**32 - 1
"""What NumPy takes."""
LARGEST_SHARE = 1e15
"""Of a blend: all shares together stay a number."""
RESERVED_NAMES = {GENERALIST: "the seed, which can be an expert of the mix", "mean": "a column of the reports"}
"""Names that no domain may have."""
_NAME_BYTES_AT_MOST = 80
"""A folder's name may have 255, and ours have words before and a date behind."""
_RUN_NAME_LETTERS_AT_MOST = 80
_TOKENIZER_FLAGS = ("tokenizer-type", "tokenizer-model")


def _check_run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > _RUN_NAME_LETTERS_AT_MOST:
        expected = f"at most {_RUN_NAME_LETTERS_AT_MOST} letters, digits, dots, dashes and underscores"
        raise ValueError(f"found {name!r}, expected {expected}, the first a letter or digit")
    return name


def _check_name(name: str) -> str:
    """Refuse a name that a later stage could not use: of a folder, an expert, a column."""
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > _NAME_BYTES_AT_MOST:
        expected = f"letters, digits, dots, dashes and underscores, at most {_NAME_BYTES_AT_MOST} bytes"
        raise ValueError(f"not a name; expected {expected}, beginning with none of . and -")
    if is_set_aside(name):
        raise ValueError("ends as the folders of earlier runs do that are kept; give it another name")
    return name


def _check_domain_name(name: str) -> str:
    reserved = RESERVED_NAMES.get(_folded(name))
    if reserved:
        raise ValueError(f"the name of {reserved}; give it another")
    return name


def _check_variant_name(name: str) -> str:
    if not name.replace("-", "").isalnum():
        raise ValueError("expected a name of letters, digits and dashes")
    return name


def _check_names_differ(named: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that some disks take for one folder."""
    seen: dict[str, str] = {}
    for name in named:
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise RefusedKeyError(
                name, f"differs from {other} in case alone, and some disks take both for one folder; give it another"
            )
    return named


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _fill_empty(named: object) -> object:
    """A section that says nothing (``top2:``) is there all the same."""
    if not isinstance(named, dict):
        return named
    return {name: {} if settings is None else settings for name, settings in named.items()}


def _check_flag(name: str) -> str:
    """Refuse what is no flag, and flags that are said elsewhere in a recipe."""
    if name.startswith("-") or "_" in name:
        raise ValueError("expected a Megatron flag without its leading dashes, as num-layers")
    if name in LAYOUT_FLAGS:
        raise ValueError(f"a layout flag; put it under layout, as layout: {{{name}: ...}}")
    if name in DERIVED_FLAGS:
        raise ValueError(f"set by the pipeline from {DERIVED_FLAGS[name]}; leave it out here")
    return name


def _check_tokenizer_flag(name: str) -> str:
    if name in _TOKENIZER_FLAGS:
        return name
    return _check_flag(name)


def _read_flag_value(value: object) -> FlagValue:
    """A flag's value. Raises ValueError for one that the command line would have as a flag of its own."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if str(item).startswith("--"):
            raise ValueError(f"found {item!r}, which is a flag; give every flag a line of its own")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, int | float | str) for item in value):
        return tuple(value)
    raise ValueError(f"found {value!r}, expected true, false, a number, a text, or a list of values")


def absolute_path(text: object) -> Path:
    """An absolute path; ``~`` is a home. Raises ValueError where there is none."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"found {text!r}, expected a text")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"found {text!r}, and there is no such home; give the path without ~") from None


def _read_model(text: object) -> Path:
    """The folder of a given model."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"found {text!r}, expected a text")
    if text.startswith("~"):
        absolute_path(text)  # refuses a home that is not there
    return find_model(text)


def _read_text_path(text: object) -> str:
    """The absolute path of a text file, a folder, or a pattern of files."""
    path = absolute_path(text)
    if not glob.has_magic(str(path)) and not path.exists():
        raise ValueError(f"{path} does not exist; expected a text file, or a folder of them")
    return str(path)


def _as_text_section(text: object) -> object:
    """``text: PATH`` and ``text: [PATH, ...]`` are files that are split by shares."""
    if isinstance(text, str):
        return {"files": [text]}
    if isinstance(text, list):
        return {"files": text}
    return text


def _as_export_section(export: object) -> object:
    """``export: true`` takes every default."""
    if export is True:
        return {}
    return None if export is False else export


def _read_dataset(text: object) -> tuple[float, str]:
    """(weight, absolute prefix) of a dataset."""
    words = re.fullmatch(r"(?:(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s+)?(\S.*)", str(text).strip())
    weight = 0.0
    if words is not None:
        weight = float(words[1] or 1.0)
    if words is None or not 0 < weight <= LARGEST_SHARE:
        expected = f'"PREFIX" or "WEIGHT PREFIX" with a weight above zero and at most {LARGEST_SHARE:g}'
        raise ValueError(f"found {text!r}, expected {expected}")
    prefix = absolute_path(words[2])
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"{prefix}{suffix} does not exist; make it with btx preprocess")
    return weight, str(prefix)


RandomSeed = Annotated[int, Field(ge=1, le=LARGEST_SEED)]
Tokens = Annotated[int, Field(ge=1)]
Processes = Annotated[int, Field(ge=1, le=1024)]
Share = Annotated[float, Field(gt=0, le=LARGEST_SHARE)]
Blend = dict[str, Share]
"""Domain -> share: shares of one, percent, or any numbers, which are normalised."""
Name = Annotated[str, AfterValidator(_check_name)]
DomainName = Annotated[Name, AfterValidator(_check_domain_name)]
VariantName = Annotated[Name, AfterValidator(_check_variant_name)]
Model = Annotated[Path, PlainValidator(_read_model)]
"""A Megatron checkpoint, a Hugging Face model folder, or a model in the hub's cache; see given.py."""
Datasets = Annotated[list[Annotated[tuple[float, str], PlainValidator(_read_dataset)]], Field(min_length=1)]
"""Texts "PREFIX" or "WEIGHT PREFIX" of .bin/.idx files."""
Texts = Annotated[list[Annotated[str, PlainValidator(_read_text_path)]], Field(min_length=1)]
"""JSONL, Parquet or plain text, plain or compressed: files, folders of them, or patterns."""
WrittenValue = Annotated[FlagValue, PlainValidator(_read_flag_value)]
WrittenFlags = dict[Annotated[str, AfterValidator(_check_flag)], WrittenValue]
"""Megatron's flags without the leading dashes; see flags.py. Null takes one back that an outer section gave."""
TokenizerFlags = dict[Annotated[str, AfterValidator(_check_tokenizer_flag)], WrittenValue]


class Section(BaseModel):
    """A mapping in the recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        alias_generator=lambda name: name.rstrip("_").replace("_", "-"),
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, node: object) -> object:
        """Null means that a key is not given; one that nobody knows is refused all the same."""
        if not isinstance(node, dict):
            return node
        known = {field.alias for field in cls.model_fields.values()}
        return {key: value for key, value in node.items() if value is not None or key not in known}

    def says(self, field: str) -> bool:
        """Whether the recipe gives this field, and not its default."""
        return field in self.model_fields_set


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
        """Those of :data:`LAYOUT_FLAGS` that are given."""
        given = self.model_dump(by_alias=True, exclude_unset=True)
        return {name: given[name] for name in LAYOUT_FLAGS if name in given}


class SettingsSection(Section):
    """Layout and flags of a stage."""

    layout: LayoutSection = LayoutSection()
    megatron: WrittenFlags = {}
    """Flags of this stage alone."""


class TrainingSection(SettingsSection):
    """A stage that trains, or a checkpoint that takes its place."""

    from_: Model | None = None
    blend: Blend = {}
    tokens: Tokens | None = None
    """The stage's budget, rounded to whole batches."""


class RoutingSection(Section):
    """How a mixture routes; see routing.py."""

    routing: str | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    load_balancing: str | None = None


class MixSection(RoutingSection):
    """The mixing stage, or a mixed checkpoint that takes its place."""

    from_: Model | None = None
    experts: list[str] | None = None
    """Names in the order of the mixture, ``seed`` among them (default: every expert, then the seed)."""
    router_seed: Annotated[int, Field(ge=0)] | None = None
    """Draws the routers (default: random-seed)."""
    megatron: WrittenFlags = {}
    """Flags of the mixture, for finetuning and evaluation alike."""


class DenseSection(Section):
    """The dense baseline: on the experts' data, then on finetuning's mixture."""

    domains: SettingsSection = SettingsSection()
    mixture: SettingsSection = SettingsSection()


class BaselinesSection(Section):
    """What the mixture is compared with."""

    average: bool = False
    """The plain average of the mix's sources."""
    dense: DenseSection | None = None


class EvaluateSection(SettingsSection):
    """Loss per domain of every model."""

    split: Literal["valid", "test"] = "valid"
    tokens: Tokens
    """Per domain."""


class VariantSection(RoutingSection):
    """What differs from mix and finetune."""

    freeze: list[str] | None = None
    """Groups of parameters; another spelling of megatron: {btx-freeze: ...}, and an empty list takes that back."""
    tokens: Tokens | None = None
    """Of its finetuning (default: as finetune)."""
    megatron: WrittenFlags = {}
    seeds: Annotated[list[RandomSeed], Field(min_length=1)] | None = None
    """(default: those of the ablation)"""


class AblationSection(Section):
    """Variants of finetuning from the same experts."""

    seeds: Annotated[list[RandomSeed], Field(min_length=1)] | None = None
    """Each draws the routers of a mix and shuffles the data of its finetuning, in every variant."""
    split: Literal["valid", "test"] = "valid"
    tokens: Tokens = 65_536
    """Per domain, measured after the last step."""
    variants: Annotated[
        dict[VariantName, VariantSection], BeforeValidator(_fill_empty), AfterValidator(_check_names_differ)
    ] = {}


class SharesSection(Section):
    """How the documents of a text are split: shares that sum to 1."""

    train: Annotated[float, Field(gt=0, le=1)]
    valid: Annotated[float, Field(gt=0, le=1)] | None = None
    test: Annotated[float, Field(gt=0, le=1)] | None = None


class TextSection(Section):
    """Text of one domain: files that are split by shares, or files for each split."""

    files: Texts | None = None
    train: Texts | None = None
    valid: Texts | None = None
    test: Texts | None = None


class DomainSection(Section):
    """One domain: datasets that are given, or text that the run makes datasets of."""

    train: Datasets | None = None
    valid: Datasets | None = None
    test: Datasets | None = None
    text: Annotated[TextSection | None, BeforeValidator(_as_text_section)] = None
    split: SharesSection | None = None
    """Of text (default: data.split)."""


class DataSection(Section):
    """Corpora that the run makes, or domains whose datasets or texts are given."""

    corpora: Literal["quickstart"] | None = None
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Of the tokenizer that is trained on the corpora."""
    workers: Processes = 2
    seed: Annotated[int, Field(ge=0)] | None = None
    """Draws the corpora, or which documents of a text go to which split (default: 1234)."""
    scale: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the corpora's full size."""
    tokenizer: TokenizerFlags = {}
    """Megatron's tokenizer flags, of given data (default: the given seed's own tokenizer)."""
    split: SharesSection | None = None
    """Of all texts that state none of their own."""
    domains: Annotated[
        dict[DomainName, DomainSection], BeforeValidator(_fill_empty), AfterValidator(_check_names_differ)
    ] = {}


class ExportSection(Section):
    """The finetuned mixture in another form, read back and compared."""

    format: Literal["hf"] = "hf"
    """A Hugging Face model folder with its tokenizer."""


class RecipeSection(Section):
    """A whole recipe."""

    name: Annotated[str, AfterValidator(_check_run_name)] | None = None
    """Of the run's folder (default: the file's)."""
    random_seed: RandomSeed = 1234
    """Of every training stage, and of the mix's routers unless mix.router-seed is given."""
    data: DataSection = DataSection()
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
    baselines: BaselinesSection = BaselinesSection()
    evaluate: EvaluateSection | None = None
    export: Annotated[ExportSection | None, BeforeValidator(_as_export_section)] = None
    """Of the finetuned mixture; true for every default."""
    ablation: AblationSection | None = None
    """Variants of finetuning; they take the place of the one finetuning stage."""
