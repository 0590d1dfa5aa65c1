"""What datasets are to be made of: domains, their files, and how their documents are split.

{"tokenizer": {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "models/seed"},
 "seed": 1234,
 "domains": {"math": {"text": ["math.jsonl"], "shares": {"train": 0.98, "valid": 0.01, "test": 0.01}},
             "code": {"train": ["code/train"], "valid": ["code/valid.parquet"]}}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object
from megatron_btx.common.names import check_name
from megatron_btx.common.refusals import describe
from megatron_btx.data.tokenizers import TokenizerSettings

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Paths = list[str]

_SHARES_TOLERANCE = 1e-6


def _check_shares(shares: dict[Split, float]) -> dict[Split, float]:
    total = sum(shares.values())
    if abs(total - 1) > _SHARES_TOLERANCE:
        raise ValueError(f"found shares that sum to {total:g}, expected 1")
    return shares


Shares = Annotated[dict[Split, Annotated[float, Field(gt=0, le=1)]], AfterValidator(_check_shares)]
"""Split -> the share of a text's documents that are drawn for it."""


class Domain(BaseModel):
    """The text of one domain: files for each split, or files whose documents are drawn for the splits by shares."""

    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", "-"))

    train: Paths | None = None
    valid: Paths | None = None
    test: Paths | None = None
    text: Paths | None = None
    shares: Shares | None = None
    json_key: str = "text"
    """Of a record's text, or the column of a Parquet file."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """skip: records that cannot be read are counted and left out."""

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        sources, splits = self.sources(), ", ".join(SPLITS)
        if not sources:
            raise ValueError(f"found no files; expected text with shares, or some of {splits}")
        if self.text and len(sources) > 1:
            raise ValueError("found text and files of a split; expected one of them")
        if bool(self.text) != bool(self.shares):
            raise ValueError(f"expected text with shares, or files for some of {splits} without")
        return self

    def sources(self) -> dict[str, Paths]:
        """ "text", or the splits -> their files, folders or globs."""
        given = {"text": self.text, "train": self.train, "valid": self.valid, "test": self.test}
        return {name: paths for name, paths in given.items() if paths}

    def splits(self) -> list[Split]:
        """The datasets that are made of it."""
        return [split for split in SPLITS if split in (self.shares or self.sources())]


class Description(BaseModel):
    """All that decides what the datasets hold, besides the files' content."""

    model_config = ConfigDict(extra="forbid")

    tokenizer: dict[str, str | bool | int | None]
    """Megatron's tokenizer flags, spelled without their leading dashes."""
    domains: dict[Annotated[str, AfterValidator(check_name)], Domain] = Field(min_length=1)
    """By their names, which begin the names of their files."""
    seed: int = 1234
    """Decides which documents go to which split."""

    def tokenizer_settings(self) -> TokenizerSettings:
        """The tokenizer's flags. Raises InputError for one that has no effect here, because training would know it."""
        known = [field.name for field in dataclasses.fields(TokenizerSettings)]
        settings = {}
        for flag, value in self.tokenizer.items():
            name = flag.replace("-", "_")
            if name not in known:
                raise InputError(f"--description: tokenizer.{flag}: this flag is not known here; leave it out")
            settings[name] = value
        if "tokenizer_type" not in settings:
            raise InputError("--description: tokenizer.tokenizer-type is missing; give Megatron's tokenizer flags")
        return TokenizerSettings(**settings)  # type: ignore[arg-type]  # pydantic has checked that they are plain


def read_description(said: str) -> Description:
    """The description in a JSON file, in JSON itself, or in the config.yaml of a stage; InputError names a fault."""
    if said.endswith(".yaml"):
        with open(said, encoding="utf-8") as file:
            return check_description(yaml.safe_load(file)["description"])
    if said.lstrip().startswith("{"):
        try:
            return check_description(json.loads(said))
        except (ValueError, RecursionError) as error:
            raise InputError(f"--description: is not JSON ({error}); give a file, or a JSON object") from error
    return check_description(read_json_object(Path(said), "give the description of the datasets as JSON"))


def check_description(said: Mapping[str, object]) -> Description:
    """The description that a JSON object holds; raises InputError with the place that is wrong."""
    try:
        return Description.model_validate(said, strict=True)
    except ValidationError as error:
        raise InputError(f"--description: {describe(error, Description)}") from error
