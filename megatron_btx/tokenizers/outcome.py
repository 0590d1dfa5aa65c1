"""A result's tokenizer, and the proof that it gives texts the ids of the source's own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.verify import Difference, Oracle, compare, read_made_files

FLAG = "--allow-other-ids"


@dataclasses.dataclass(frozen=True)
class ResultTokenizer:
    """The tokenizer of a result."""

    files: Mapping[str, bytes]
    """Its files, and those that travel with them; none where the source has no tokenizer."""
    record: Mapping[str, Any]
    """What was done and proved, for the manifest."""
    rows: int
    """Tokens from this number on have no row."""

    @property
    def ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and pad_token_id, those that there are."""
        return tokenizer_files.special_ids(self.files, self.rows)


def prove(
    oracle: Oracle,
    files: Mapping[str, bytes],
    rows: int,
    model_config: Mapping[str, Any] | None,
    texts: Sequence[str],
    form: str,
) -> ResultTokenizer | Difference:
    """Compare written files with the source's own tokenizer.

    Args:
        model_config: the result's configuration, where transformers is to be asked, too.
        form: where the files come from, in words.
    """
    ties = compared = 0
    for encode in read_made_files(files, model_config):
        difference, ties, compared = compare(oracle, encode, texts, rows)
        if difference is not None:
            return difference
    tokenizers = f"tokenizers {importlib.metadata.version('tokenizers')}"
    tied = ""
    if ties:
        tied = f", {ties} of them up to the order of equally probable pieces"
    if compared < len(texts):
        tied += f"; {len(texts) - compared} texts hold a token without a row and were not compared"
    said = f"{form}; {compared} texts get the ids of {oracle.name} in {tokenizers}{tied}"
    record = {"said": said, "form": form, "texts": compared, "ties": ties, "other_ids": 0}
    record |= {"read_by": oracle.name, "compared_with": tokenizers}
    return ResultTokenizer(files, record, rows)


def accept(
    outcome: ResultTokenizer | Difference, files: Mapping[str, bytes], rows: int, form: str, allow_other_ids: bool
) -> ResultTokenizer:
    """What was proved; or what differs, where the user allows it.

    Raises:
        InputError: it differs, and the user has not allowed it.
    """
    if isinstance(outcome, ResultTokenizer):
        return outcome
    if not allow_other_ids:
        raise InputError(
            f"the tokenizer of the result ({form}) is not that of the source: {outcome}; give the source a "
            f"tokenizer.json that makes its ids, or {FLAG} if you know better"
        )
    said = f"{form}; {FLAG} was given: {outcome}"
    record = {"said": said, "form": form, "other_ids": outcome.count, "first_text": outcome.text}
    return ResultTokenizer(files, record, rows)
