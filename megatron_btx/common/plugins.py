"""Rows from other packages: a method of mixing, a baseline or a claim that somebody else wrote.

A package names a module under the entry points ``megatron_btx``; importing it adds its rows to the tables
(``mixing.methods.METHODS``, ``recipe.expand.BASELINES``, ``report.claims.CLAIMS``). So the programs that a run starts
know them, too.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from megatron_btx.common.errors import InputError

GROUP = "megatron_btx"


@cache
def load_plugins() -> None:
    """Import what other packages add. Raises InputError for one that cannot be imported, or whose import fails."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever a stranger's module raises
            package = entry.dist.name if entry.dist else entry.value
            raise InputError(
                f"the package {package} adds {entry.value} to megatron_btx, and its import fails: "
                f"{type(error).__name__}: {error}; mend or uninstall it"
            ) from error
