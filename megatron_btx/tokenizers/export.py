"""Which tokenizer a result has: the source's own in a form that every reader understands alike, proved before writing.

Folders and checkpoints name tokenizers in many forms, and a form that is carried as it is can mean other ids to another
version of transformers. So the result gets a ``tokenizer.json`` and a class that only reads it. Where the source has
both, they are carried; else they are made: from the SentencePiece model, from GPT-2's two files, or from what the
installed transformers makes of the folder. Either way some hundred texts must get the ids that the source's own gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.from_files import file_tokenizer
from megatron_btx.tokenizers.from_folder import folder_tokenizer
from megatron_btx.tokenizers.outcome import FLAG, ResultTokenizer
from megatron_btx.tokenizers.vocabulary import ModelTokenizer


def result_tokenizer(source: ModelTokenizer, model_config: Mapping[str, Any], allow_other_ids: bool) -> ResultTokenizer:
    """Make and prove the tokenizer of a result.

    Args:
        source: the tokenizer of the model that it is taken from.
        model_config: the result's config.json; transformers takes some classes by its model type.
        allow_other_ids: write it even where it cannot be proved.

    Raises:
        InputError: the written tokenizer gives a text other ids, or there is no form for it; names the first text.
    """
    place, rows = source.place, source.rows
    if place is None:
        return ResultTokenizer(_files_in(source.folder), {"said": "no tokenizer came along", "texts": 0}, rows)
    make = file_tokenizer
    if place.is_dir():
        make = folder_tokenizer
    try:
        return make(source, place, model_config, allow_other_ids)
    except InputError as error:
        if not allow_other_ids:
            raise InputError(f"{source.model}: {error}") from error
        record = {"said": f"not proved, {FLAG} was given: {error}", "texts": 0}
        return ResultTokenizer(_files_in(place), record, rows)


def _files_in(place: Path | None) -> dict[str, bytes]:
    """A folder's files that make tokens and text; none where there is no folder."""
    if place is None or not place.is_dir():
        return {}
    return tokenizer_files.travelling_files(place)
