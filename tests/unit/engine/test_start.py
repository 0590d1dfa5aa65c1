"""The checkpoint that a run starts from, compared with the given arguments."""

from __future__ import annotations

import re
from argparse import Namespace

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.engine.checks import start
from megatron_btx.engine.checks.start import compare_with_stored


def test_a_change_is_offered_only_where_the_weights_fit(monkeypatch):
    """Sizes decide the tensors: allowing them would end in Megatron's loader. Dense models and mixtures never meet."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_experts": None, "position_embedding_type": "rope"}
    sizes |= {"max_position_embeddings": 64, "btx_allow_change": []}

    def said(stored: dict, given: dict) -> str:
        stand_in = Namespace(folder="f", check_objects=lambda: None, arguments=lambda: sizes | stored)
        monkeypatch.setattr(start, "TorchDistReader", lambda _: stand_in)
        monkeypatch.setattr(start, "resolve_iteration", lambda path: path)
        monkeypatch.setattr(start, "root_of", lambda path: path)
        monkeypatch.setattr(start, "locate_tokenizer", lambda found, _: found)
        with pytest.raises(InputError) as refusal:
            compare_with_stored("here", sizes | given)
        return str(refusal.value)

    shapes = said({}, {"hidden_size": 64, "num_layers": 4})
    assert shapes.endswith("Give the stored values: the weights do not fit another --num-layers, --hidden-size")
    both = said({}, {"hidden_size": 64, "rotary_base": 500})
    assert both.endswith(
        "another --hidden-size; for the rest you can allow the change with --btx-allow-change rotary_base"
    )
    assert said({}, {"rotary_base": 500}).endswith("or allow the change with --btx-allow-change rotary_base")
    longer = {"max_position_embeddings": 128}
    assert "--btx-allow-change max_position_embeddings" in said({}, longer)
    learned = {"position_embedding_type": "learned_absolute"}
    assert "--btx-allow-change" not in said(learned, learned | longer)
    for stored, given, what in (
        (None, 4, "a dense model: give it .* without"),
        (4, None, "a mixture: give it .* with "),
    ):
        message = said({"num_experts": stored}, {"num_experts": given})
        assert re.search(what + r".*the mixture's flags", message) and "--btx-allow-change" not in message
    assert "do not fit another --num-experts" in said({"num_experts": 4}, {"num_experts": 2})
