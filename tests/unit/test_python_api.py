"""What ``import megatron_btx`` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_btx
from megatron_btx.common.errors import InputError
from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import Zygote


def in_a_fresh_process(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", megatron_btx.__all__)
def test_every_name_is_a_function_or_an_error(name: str) -> None:
    """Also ``evaluate``, which is the name of a program too."""
    kind = "type" if name.endswith("Error") else "function"
    assert in_a_fresh_process(f"from megatron_btx import {name}; print(type({name}).__name__)") == kind
    assert in_a_fresh_process(f"import megatron_btx; print(type(megatron_btx.{name}).__name__)") == kind
    assert name in dir(megatron_btx)


def test_the_import_is_light() -> None:
    """And a name that is not there is an AttributeError, as everywhere."""
    heavy = "{'torch', 'megatron', 'pydantic', 'numpy'}"
    assert in_a_fresh_process(f"import sys, megatron_btx; print(sys.modules.keys() & {heavy})") == "set()"
    with pytest.raises(AttributeError, match="has no attribute 'evaluates'"):
        megatron_btx.evaluates  # noqa: B018


def test_evaluate(dense: Path, corpus: Path, zygote: Zygote, tmp_path: Path) -> None:
    """The same numbers as the program's, from the flags that the checkpoint stores."""
    texts = {"text": str(corpus)}
    found = megatron_btx.evaluate({"seed": dense}, texts, tokens=1024)
    output = tmp_path / "evaluation.json"
    words = ["--btx-eval-model", f"seed={dense}", "--btx-eval-data", f"text={corpus}"]
    words += ["--btx-eval-tokens", "1024", "--btx-eval-output", str(output)]
    zygote.run(1, pico.train(corpus, 1) + words, tmp_path / "log", entry="megatron_btx.evaluation.program")
    from megatron_btx.runner.run_dir import read_evaluation

    expected = read_evaluation(output)
    assert found.models["seed"].losses["text"] == pytest.approx(expected.models["seed"].losses["text"], abs=1e-6)
    assert found.models["seed"].parameters == expected.models["seed"].parameters
    assert found.models["seed"].routing is None


@pytest.mark.usefixtures("starts_warm")
def test_evaluate_a_mixture(dense: Path, corpus: Path, tmp_path: Path) -> None:
    """On two processes; with routing."""
    mixture = mix({"a": dense, "b": dense / "iter_0000005"}, tmp_path / "mixture")
    found = megatron_btx.evaluate({"mix": mixture}, {"text": corpus}, tokens=1024, processes=2, use_gpus=False)
    assert found.experts == ["a", "b"]
    routing = found.models["mix"].routing
    assert routing is not None and sum(routing["text"][0]) == pytest.approx(1)


@pytest.mark.usefixtures("starts_warm")
def test_evaluate_refuses(dense: Path, corpus: Path, tmp_path: Path) -> None:
    """With the program's own line."""
    with pytest.raises(InputError, match="no models or no texts"):
        megatron_btx.evaluate({}, {})
    with pytest.raises(InputError, match=f"{tmp_path}: is no Megatron checkpoint; convert"):
        megatron_btx.evaluate({"m": tmp_path}, {"text": corpus})
    with pytest.raises(InputError, match="--btx-eval-tokens 5: fewer than one batch"):
        megatron_btx.evaluate({"m": dense}, {"text": corpus}, tokens=5)
