"""What an evaluation counts and where its tokens stand: as Megatron's datasets do it in training."""

from __future__ import annotations

from argparse import Namespace

import megatron.training
import pytest
import torch

from megatron_btx.model.step import masks_and_positions

END = 9


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_masks_and_positions(eod_mask_loss, reset, has_mask, monkeypatch):
    """--eod-mask-loss leaves out what follows a document's end; the two other flags begin anew after it."""
    monkeypatch.setattr(megatron.training, "get_tokenizer", lambda: Namespace(eod=END))
    args = Namespace(
        eod_mask_loss=eod_mask_loss,
        reset_position_ids=reset,
        reset_attention_mask=reset,
        create_attention_mask_in_dataloader=has_mask,
    )
    found = masks_and_positions(torch.tensor([[1, END, 2, 3], [4, 5, 6, 7]]), args)
    assert found["loss_mask"].tolist() == [[1, 0 if eod_mask_loss else 1, 1, 1], [1, 1, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 0, 1] if reset else [0, 1, 2, 3], [0, 1, 2, 3]]
    if not has_mask:
        assert found["attention_mask"] is None
        return
    assert found["attention_mask"].shape == (2, 1, 4, 4)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert torch.equal(found["attention_mask"][1, 0], hidden)
    hidden[2:, :2] |= reset
    assert torch.equal(found["attention_mask"][0, 0], hidden)
