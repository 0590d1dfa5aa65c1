"""Checkpoints of older Megatron versions, in every form of their keys: the same mix to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.mixing.convert_hf import main as convert_hf
from tests.support.mixing import mix
from tests.support.old_formats import FORMS, MIXTURE_FORMS, Form, write_form
from tests.unit.mixing.checkpoints import byte_entry, iteration, same_bits, tensors

COMMON = "common_state/shard_0_1"


@pytest.fixture(scope="module")
def expected(experts, tmp_path_factory) -> Path:
    """The mix of two experts in today's form."""
    return mix({"a": experts["code"], "b": experts["wiki"]}, tmp_path_factory.mktemp("expected") / "mix")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_mixes_bit_for_bit(form: Form, experts, expected, tmp_path):
    """Both experts in the form; and one of them in it, one in today's. The training programs' check passes it."""
    old = {name: write_form(experts[name], tmp_path / name, form) for name in ("code", "wiki")}
    TorchDistReader(iteration(old["code"])).check_objects()
    reference = tensors(expected)
    for number, pair in enumerate(({"a": old["code"], "b": old["wiki"]}, {"a": experts["code"], "b": old["wiki"]})):
        found = tensors(mix(pair, tmp_path / str(number)))
        assert found.keys() == reference.keys()
        assert all(same_bits(found[key], reference[key]) for key in reference)
    stored = vars(byte_entry(tmp_path / "0", COMMON)[0]["args"])
    assert stored["num_experts"] == 2 and stored["moe_ffn_hidden_size"] == 48


@pytest.mark.parametrize("form", MIXTURE_FORMS, ids=str)
def test_mixtures_of_every_form_are_read(form: Form, expected, tmp_path):
    """Exported to Hugging Face, a mixture in an old form gives the bytes of the same mixture in today's."""
    old = write_form(expected, tmp_path / "old", form)
    for name, source in (("old-hf", old), ("new-hf", expected)):
        assert convert_hf(["export", "--checkpoint", str(source), "--output", str(tmp_path / name)]) == 0
    found, reference = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("old-hf", "new-hf"))
    assert found == reference
