"""Which experts each token of one text takes, for the page that colours them."""

from __future__ import annotations

from typing import Any


def route_text(model: list[Any], text: str, is_text: bool) -> dict[str, Any]:
    """The route of every token of a text (or of the start of the dataset ``text``), up to one micro-batch.

    Returns:
        ``pieces``: the tokens' texts; ``layers``: numbers from 0; ``gates``: [L, T, E], rounded to 1/1000.
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    from megatron_btx.model.step import batches_of, forward
    from megatron_btx.model.watch import mixtures, watching

    args = get_args()
    length, micro = args.seq_length, args.micro_batch_size
    ids = _token_ids(text, is_text)
    batches = batches_of(_fill_batches(ids), "the text")
    gates_LBSE = torch.zeros(args.num_layers, micro, length, args.num_experts, device="cuda")
    first = mpu.get_tensor_model_parallel_rank()

    def add(layer: int, _router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        """Keep the gates; under sequence parallelism a rank has its part of the sequence."""
        part = x_SBH.shape[0]
        start = 0
        if part < length:
            start = first * part
        gates_SBE = outputs[0].float().reshape(part, micro, -1)
        gates_LBSE[layer, :, start : start + part] = gates_SBE.transpose(0, 1)

    with watching(model, add):
        forward(model, batches)
    if mpu.get_data_parallel_rank() > 0:
        gates_LBSE.zero_()
    torch.distributed.all_reduce(gates_LBSE)
    layers = mixtures()
    gates_LTE = gates_LBSE[layers].flatten(1, 2)[:, : len(ids)]
    return {"pieces": _show_tokens(ids), "layers": layers, "gates": gates_LTE.double().round(decimals=3).tolist()}


def _token_ids(text: str, is_text: bool) -> list[int]:
    """The tokens of a text, as many as a micro-batch holds; or of a dataset's first sequence."""
    from megatron.training import get_args, get_tokenizer

    from megatron_btx.data.texts import start_of

    args = get_args()
    if is_text:
        tokens, most = get_tokenizer().tokenize(text), args.micro_batch_size * args.seq_length
    else:
        tokens, most = start_of(text, args.seq_length), args.seq_length
    return list(map(int, tokens))[:most]


def _fill_batches(ids: list[int]) -> Any:
    """One micro-batch, the same on every data-parallel rank and as often as a pipeline needs.

    What follows the text changes nothing before it (but under a capacity, which looks at later tokens).
    """
    import numpy as np
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    repeats = mpu.get_data_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size()
    padded = np.resize(np.array(ids, dtype=np.int64), args.micro_batch_size * args.seq_length)
    padded[len(ids) :] = 0
    return np.append(np.tile(padded, repeats), 0)


def _show_tokens(ids: list[int]) -> list[str]:
    """The texts of tokens; their numbers where there is no tokenizer."""
    from megatron.training import get_args, get_tokenizer

    if get_args().tokenizer_type == "NullTokenizer":
        return [f"{token} " for token in ids]
    return pieces_of(ids, get_tokenizer())


def pieces_of(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; together they are the text, even where a character takes several tokens.

    A token's text depends on the one before it (SentencePiece's blanks), so that two pieces are decoded at a time.
    """
    pieces: list[str] = []
    start = read = 0
    for count in range(1, len(ids) + 1):
        before = ""
        if read > start:
            before = tokenizer.detokenize(ids[start:read])
        after = tokenizer.detokenize(ids[start:count])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids):  # in a character: its last token shows it
            pieces.append("")
            continue
        if after.startswith(before):
            pieces.append(after[len(before) :])
        else:
            pieces.append(tokenizer.detokenize(ids[read:count]))
        start, read = read, count
    return pieces
