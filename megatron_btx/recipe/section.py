"""A mapping in a recipe: what all of them have in common."""

from __future__ import annotations

import re

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A mapping in the recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
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


def form(pattern: str, expected: str) -> AfterValidator:
    """A text of one form."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"found {text!r}, expected {expected}")
        return text

    return AfterValidator(check)
