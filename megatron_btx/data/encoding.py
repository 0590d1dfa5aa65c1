"""Units of text into token ids, here or in several processes, the results in the units' order."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, MachineError
from megatron_btx.data import readers, tokenizers
from megatron_btx.data.description import Tokenizer as DescribedTokenizer
from megatron_btx.data.indexed import choose_dtype
from megatron_btx.data.readers import BadRecord, Tally, Unit
from megatron_btx.data.tokenizers import DocumentEncoder, TokenizerSettings

if TYPE_CHECKING:
    import numpy

_DRAW_BYTES = 6
"""Of a hash; a float holds whole numbers of this size exactly."""


@dataclass
class EncodedUnit:
    """The documents of one unit, by JSON key."""

    ids: dict[str, numpy.ndarray[Any, Any]]
    """Token ids of all documents, one after the other."""
    lengths: dict[str, list[int]]
    """Tokens of each document."""
    draws: dict[str, list[float]]
    """A number from 0 up to 1 for each document; empty unless the encoder has a seed."""
    empty_documents: int = 0
    """Documents left out because they hold no token."""
    bad_records: Tally = field(default_factory=Tally)
    input_bytes: int = 0


@dataclass(frozen=True)
class Encoder:
    """All that turns a unit into tokens; each worker holds one."""

    document_ids: DocumentEncoder
    keys: tuple[str, ...]
    vocab_size: int
    dtype: type[numpy.number[Any]]
    refuse_record: Callable[[BadRecord], None] | None
    """Raises for a record that cannot be read; None where such records are counted and left out."""
    described: DescribedTokenizer
    draw_seed: int | None
    """Draws a number for each document, see :func:`draw`; None where nobody wants any."""

    def encode(self, unit: Unit) -> EncodedUnit:
        """Tokenize the documents of a unit; InputError names the document that cannot be."""
        import numpy

        ids: dict[str, list[int]] = {key: [] for key in self.keys}
        lengths: dict[str, list[int]] = {key: [] for key in self.keys}
        draws: dict[str, list[float]] = {key: [] for key in self.keys}
        encoded = EncodedUnit({}, lengths, draws, input_bytes=unit.input_bytes)
        for where, texts in readers.parse(unit, self.keys, self.refuse_record or encoded.bad_records.add):
            for key in self.keys:
                tokens = self._tokens(texts[key], key, where)
                if not tokens:
                    encoded.empty_documents += 1
                    continue
                ids[key] += tokens
                lengths[key].append(len(tokens))
                if self.draw_seed is not None:
                    draws[key].append(draw(texts[key], self.draw_seed))
        for key in self.keys:
            encoded.ids[key] = numpy.array(ids[key], dtype=self.dtype)
        return encoded

    def _tokens(self, text: str, key: str, where: str) -> list[int]:
        try:
            tokens = self.document_ids.ids(text)
        except ValueError as error:  # words where the NullTokenizer wants numbers
            raise InputError(f"{where}: {key!r} cannot be tokenized: {error}") from error
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            span = f"{min(tokens)} to {max(tokens)}"
            raise InputError(f"{where}: token ids {span} leave the vocabulary of {self.vocab_size}")
        return tokens


def draw(text: str, seed: int) -> float:
    """A number from 0 up to 1 that a text and a seed decide, and nothing else: a hash of both."""
    hashed = blake2b(f"{seed}\n{text}".encode(), digest_size=_DRAW_BYTES).digest()
    return int.from_bytes(hashed) / 2 ** (8 * _DRAW_BYTES)


def make_encoder(
    settings: TokenizerSettings,
    keys: tuple[str, ...] = (readers.TEXT_KEY,),
    *,
    append_eod: bool,
    refuse_record: Callable[[BadRecord], None] | None = None,
    draw_seed: int | None = None,
) -> Encoder:
    """Load a tokenizer; InputError where it cannot be read, or has no end-of-document token and one is asked for."""
    tokenizer = tokenizers.load(settings)
    size = tokenizers.count_numbers(tokenizer)
    eod = None
    if append_eod:
        eod = tokenizer.eod
        if eod is None or not 0 <= eod < size:  # Megatron would write -1, which wraps to a huge id
            raise InputError(
                f"--append-eod: the tokenizer {settings.tokenizer_model or settings.tokenizer_type} has no "
                f"end-of-document token (found {eod}); train it with an eos token, or leave the flag out"
            )
    return Encoder(
        document_ids=DocumentEncoder.of(tokenizer, eod),
        keys=keys,
        vocab_size=size,
        dtype=choose_dtype(size),
        refuse_record=refuse_record,
        described=DescribedTokenizer.of(dataclasses.asdict(settings), size),
        draw_seed=draw_seed,
    )


_UNITS_IN_FLIGHT_PER_WORKER = 4


class _Worker:
    """A worker process's own function, put there once by the fork instead of with every unit."""

    encode: Callable[[Unit], Any]

    @classmethod
    def start(cls, encode: Callable[[Unit], Any]) -> None:
        """Called in the new process. An interrupt is the parent's to answer, in one line."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cls.encode = staticmethod(encode)

    @classmethod
    def run(cls, unit: Unit) -> Any:
        """Called in the process for every unit."""
        return cls.encode(unit)


def in_order[Encoded](
    stack: contextlib.ExitStack, encode: Callable[[Unit], Encoded], workers: int
) -> Callable[[Iterator[Unit]], Iterator[Encoded]]:
    """A function that encodes units and gives the results in the units' order, here or in worker processes.

    The processes start now and end with the stack. What a worker raises is raised here; a worker that dies is a
    MachineError with the signal.

    Raises:
        InputError: there is to be no worker.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")
    if workers == 1:
        return lambda units: map(encode, units)
    # Rust threads of Hugging Face tokenizers would fight over the cores that the processes use already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    strangers = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _Worker.start, (encode,))
    stack.callback(pool.shutdown, cancel_futures=True)
    pool.submit(os.getpid).result()  # with fork, the first task starts all processes
    processes = [process for process in multiprocessing.active_children() if process not in strangers]

    def run(units: Iterator[Unit]) -> Iterator[Encoded]:
        waiting: deque[tuple[str, Future[Encoded]]] = deque()
        path = ""
        try:
            for unit in units:
                waiting.append((unit.path, pool.submit(_Worker.run, unit)))
                if len(waiting) >= workers * _UNITS_IN_FLIGHT_PER_WORKER:
                    path, future = waiting.popleft()
                    yield future.result()
            while waiting:
                path, future = waiting.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            pool.shutdown()  # so that every exit status is known
            raise MachineError(
                f"a worker was killed ({_cause(processes)}) at {path or 'start'}, most likely for want of memory: "
                "lower --workers; if one worker dies as well, leave that file out"
            ) from error

    return run


def _cause(processes: Sequence[BaseProcess]) -> str:
    """How the first worker ended: the pool itself ends the others by SIGTERM."""
    codes = [process.exitcode for process in processes if process.exitcode]
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
