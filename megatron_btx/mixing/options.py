"""Options of a conversion, each declared once: its flag, keyword, recipe key, default, help, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_btx.common.errors import InputError

RESULT, DIFFERENCES, MIXTURE = "what the result holds", "what models may differ in", "which mixture is made"
"""Groups of options that decide a result. A recipe has each of them as a key, under the flag's own name."""
WORK = ""
"""Options that decide how the work is done, and no number of the result."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option; a field of :class:`Request` or :class:`Options`, or a method's own."""

    name: str
    """The keyword of Python."""
    help: str
    """A default is added, unless this says one."""
    kind: type = str
    """str, int or float; bool: a flag without a value; dict: NAME=VALUE, repeated, and a mapping in Python."""
    default: Any = None
    """Of a method's own option, None: there is none, and it must be given."""
    metavar: str = ""
    flag: str = ""
    """Without leading dashes; "" for the name with dashes."""
    group: str = MIXTURE
    choices: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    """Makes of what is given, in Python or as text, what the request holds. Raises InputError."""
    expect: Callable[[Any], str] | None = None
    """What is expected instead of a value that cannot be; "" for one that can."""

    @property
    def key(self) -> str:
        """The name on the command line and in recipes."""
        return self.flag or self.name.replace("_", "-")

    def value_of(self, given: object) -> Any:
        """The value, read and checked.

        Raises:
            InputError: names the flag, what was given and what is expected.
        """
        value = given
        if self.read is not None:
            value = self.read(given)
        expected = ""
        if self.choices and value not in self.choices:
            expected = " or ".join(self.choices)
        elif self.expect is not None:
            expected = self.expect(value)
        if expected:
            raise InputError(f"--{self.key} {value}: expected {expected}")
        return value

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add the flag to a command line."""
        words: dict[str, Any] = {"dest": self.name, "help": self.help, "default": self.default}
        if self.kind is bool:
            words["action"] = "store_true"
        else:
            words["metavar"] = self.metavar or None
            words["choices"] = self.choices or None
        if self.kind is dict:
            words |= {"action": "append", "default": []}
        elif self.kind in (int, float):
            words["type"] = self.kind
        if self.kind not in (bool, dict) and self.default is not None and "default" not in self.help:
            words["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{self.key}", **words)


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a record that is an option; its name is the field's."""
    row = Option("", help, default=default, **more)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"option": row})
    return dataclasses.field(default=default, metadata={"option": row})


def options_of(record: type) -> dict[str, Option]:
    """The options among the fields of a record, by name."""
    found = {}
    for field in dataclasses.fields(record):
        if "option" in field.metadata:
            found[field.name] = dataclasses.replace(field.metadata["option"], name=field.name)
    return found


class Record:
    """A dataclass whose options are read and checked when it is made."""

    def __post_init__(self) -> None:
        for name, row in options_of(type(self)).items():
            object.__setattr__(self, name, row.value_of(getattr(self, name)))


def between(least: int, most: int, remedy: str = "") -> Callable[[int], str]:
    """Expects a whole number in a range."""
    return lambda number: "" if least <= number <= most else f"{least} to {most}{remedy}"
