"""docs/flags.md, made from the parsers: ``python -m tests.support.flags_page`` writes it, a test compares it."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_btx import cli
from megatron_btx.data import datasets, preprocess
from megatron_btx.engine.flags import add_own_arguments
from megatron_btx.evaluation.analyze_routing import add_analysis_arguments
from megatron_btx.evaluation.init_router import add_init_arguments
from megatron_btx.evaluation.program import add_evaluation_arguments
from megatron_btx.mixing import cli as mixing
from megatron_btx.mixing import convert_hf
from megatron_btx.training.program import add_training_arguments

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
INTRODUCTION = """# Flags

Made from the parsers by `python -m tests.support.flags_page`. The programs also take every flag of Megatron's.
`--help-megatron` lists them. TEXT is the prefix of an indexed dataset, or a text file, which is tokenized as it is
read ([files](recipes.md#text-that-you-have)). Started without torchrun or srun, each program is one process.
"""


def own_flags() -> dict[str, argparse.ArgumentParser]:
    """Parsers with the flags that we add to Megatron's, by heading."""
    adders = {
        "Every program": add_own_arguments,
        "`btx train`, `-m megatron_btx.pretrain`": add_training_arguments,
        "`btx evaluate`, `-m megatron_btx.evaluate`": add_evaluation_arguments,
        "`btx route`, `tools/analyze_routing.py`": add_analysis_arguments,
        "`btx init-router`, `tools/init_router.py`": add_init_arguments,
    }
    parsers = {}
    for heading, add in adders.items():
        parsers[heading] = argparse.ArgumentParser(add_help=False)
        add(parsers[heading])
    return parsers


def tools() -> dict[str, argparse.ArgumentParser]:
    """Parsers of the commands that do not start Megatron, by heading."""
    parsers = {
        "`btx convert`, `tools/convert_experts.py`": mixing.parser(),
        "`btx convert-hf`, `tools/convert_hf.py`": convert_hf.parser(),
        "`btx preprocess`, `tools/preprocess_data.py`": preprocess.make_parser(),
        "`btx datasets`": datasets.make_parser(),
    }
    for heading, parser in list(parsers.items()):
        parsers |= {f"{heading} {name}": sub for name, sub in commands_of(parser).items()}
    for name, sub in commands_of(cli.make_parser()).items():
        if name in ("run", "plan", "submit", "status"):
            parsers[f"`btx {name}`"] = sub
    return parsers


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's own commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def table(parser: argparse.ArgumentParser, heading: str, said: dict[str, str]) -> list[str]:
    """A row for every flag of a parser; of one that was said under another heading the name alone."""
    rows = []
    again: dict[str, list[str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction | argparse._VersionAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        values = action.metavar or ""
        if action.choices and action.option_strings:
            values = "|".join(map(str, action.choices))
        if isinstance(values, tuple):
            values = " ".join(values)
        if action.nargs in ("+", "*"):
            values += " ..."
        if action.nargs == 0 or not action.option_strings:
            values = ""
        text = " ".join((action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%").split())
        flag = f"{name} {values}".strip().replace("|", "\\|")
        row = f"| `{flag}` | {text} |"
        if row in said:
            again.setdefault(said[row], []).append(f"`{name}`")
        else:
            said[row] = heading.partition(",")[0]
            rows.append(row)
    lines = []
    if rows:
        lines += ["| flag | meaning |", "|---|---|", *rows, ""]
    for first, names in again.items():
        lines += [f"As for {first}: {', '.join(names)}.", ""]
    return lines


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## Added to Megatron's", ""]
    said: dict[str, str] = {}
    for heading, parser in own_flags().items():
        lines += [f"### {heading}", "", *table(parser, heading, said)]
    lines += ["## Commands of their own", ""]
    for heading, parser in tools().items():
        found = table(parser, heading, said)
        if found:
            lines += [f"### {heading}", "", *found]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
