"""Branch-Train-Merge in an evaluation: the flags that ask for it, and the scores of the ensembles."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_btx.common.cli_args import read_pairs, split_pair
from megatron_btx.common.ensembles import NEAREST, WEIGHTINGS, name_ensemble
from megatron_btx.common.errors import InputError
from megatron_btx.evaluation.ensembles import (
    CONTEXT_INTERVAL,
    PRIOR_SEQUENCES,
    WEIGHTS,
    Evidence,
    Nearness,
    cached_prior,
    ensemble_losses,
)
from megatron_btx.model.step import MeanLoss, batches_of, forward

_MEMBER = "--btx-btm-member"
_PRIOR = "--btx-btm-prior-data"
DOCUMENTS = 10_000
"""Of each training text that are looked at, evenly spread over an indexed dataset."""


def add_btm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to the evaluation's parser."""
    group = parser.add_argument_group(
        "megatron_btx Branch-Train-Merge", "ensembles of the evaluated models, beside them: no mixture is made"
    )
    group.add_argument(
        _MEMBER,
        metavar="MODEL=[SHARE:]TEXT",
        nargs="+",
        action="extend",
        default=[],
        help="a member of the ensembles, one of --btx-eval-model, and a text that it was trained on, as an indexed "
        "dataset or a text file; repeat for several texts, with their shares (default: equal ones)",
    )
    group.add_argument(
        "--btx-btm-top-k", metavar="K", type=int, nargs="+", default=[1, 2], help="members used at once (default: 1 2)"
    )
    what = "tokens after which the nearest members are sought again; those before the first take all (default: 32)"
    group.add_argument("--btx-btm-interval", metavar="TOKENS", type=int, default=CONTEXT_INTERVAL, help=what)
    rows = "; ".join(f"{name}: {row.meaning}" for name, row in WEIGHTINGS.items())
    group.add_argument(
        "--btx-btm-weights",
        choices=tuple(WEIGHTINGS),
        nargs="+",
        default=[NEAREST],
        metavar="NAME",
        help=f"how they are weighed. {rows} (default: tf-idf)".replace("%", "%%"),
    )
    what = f"development text of a domain for bayes-cached; its first {PRIOR_SEQUENCES} sequences count (default: none)"
    group.add_argument(_PRIOR, metavar="DOMAIN=TEXT", nargs="+", action="extend", default=[], help=what)


@dataclass(frozen=True)
class Ensembles:
    """What the flags ask for."""

    texts: Mapping[str, Sequence[tuple[float, str]]]
    """Member -> the shares and the paths of what it was trained on."""
    top_k: Sequence[int]
    weights: Sequence[str]
    prior_data: Mapping[str, str]
    """Domain -> development text."""
    interval: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Ensembles | None:
        """What the flags say; None where they ask for nothing.

        Raises:
            InputError: an unknown member, or one that is a mixture; a share, or a number of members, that is none.
        """
        texts: dict[str, list[tuple[float, str]]] = {}
        for word in args.btx_btm_member:
            name, value = split_pair(word, _MEMBER, "MODEL=[SHARE:]TEXT")
            texts.setdefault(name, []).append(_read_share(word, value))
        if not texts:
            return None
        if args.num_experts:
            raise InputError(f"{_MEMBER}: members are dense models, found a mixture (--num-experts); evaluate it apart")
        for name in texts:
            if name not in args.btx_eval_model:
                known = ", ".join(args.btx_eval_model)
                raise InputError(f"{_MEMBER} {name}=: is not evaluated; expected one of {known}")
        for k in args.btx_btm_top_k:
            if not 1 <= k <= len(texts):
                raise InputError(f"--btx-btm-top-k {k}: expected 1 to {len(texts)}, the number of members")
        prior = read_pairs(args.btx_btm_prior_data, _PRIOR)
        cached = [name for name in args.btx_btm_weights if WEIGHTINGS[name].needs_prior]
        if bool(cached) != bool(prior):
            raise InputError(f"--btx-btm-weights bayes-cached and {_PRIOR} go together; give both, or none")
        if args.btx_btm_interval < 1:
            raise InputError(f"--btx-btm-interval {args.btx_btm_interval}: expected a number of tokens, at least 1")
        return cls(texts, args.btx_btm_top_k, args.btx_btm_weights, prior, args.btx_btm_interval)

    def check(self) -> None:
        """Refuse texts that cannot be read, before any process group exists. Raises InputError."""
        from megatron_btx.data.texts import check_documents

        for name, texts in self.texts.items():
            for _, path in texts:
                check_documents(path, f"{_MEMBER} {name}=")

    def read_nearness(self) -> Nearness | None:
        """The members' training texts; None where no way of weighing compares with them.

        Raises:
            ForeignIdError: a text holds an id beyond the vocabulary.
        """
        from megatron.training import get_args

        from megatron_btx.data.texts import spread_documents
        from megatron_btx.data.training import check_text

        if not any(WEIGHTINGS[name].needs_texts for name in self.weights):
            return None
        paths = list(dict.fromkeys(path for texts in self.texts.values() for _, path in texts))
        documents = []
        for path in paths:
            documents.append(spread_documents(path, DOCUMENTS))
            check_text(np.concatenate(documents[-1]), f"{_MEMBER} {path}", get_args())
        shares_NT = np.zeros((len(self.texts), len(paths)))
        for row, texts in enumerate(self.texts.values()):
            for share, path in texts:
                shares_NT[row, paths.index(path)] += share / sum(each for each, _ in texts)
        return Nearness(documents, shares_NT, get_args().padded_vocab_size)


def _read_share(word: str, value: str) -> tuple[float, str]:
    """The share and the path of [SHARE:]TEXT."""
    before, colon, path = value.partition(":")
    try:
        share = float(before)
    except ValueError:
        return 1.0, value
    if not colon or not path or not share > 0 or not math.isfinite(share):
        raise InputError(f"{_MEMBER} {word}: expected MODEL=[SHARE:]TEXT with a share above zero")
    return share, path


class Measured(NamedTuple):
    """What an ensemble gave on one text."""

    loss: MeanLoss
    shares: list[float]
    """Of each member in the weights of all tokens."""


class MemberLosses:
    """The losses of the members, token by token, as they are evaluated one after the other."""

    def __init__(self, ensembles: Ensembles, nearness: Nearness | None) -> None:
        self.ensembles, self._nearness = ensembles, nearness
        self._logs: dict[str, dict[str, np.ndarray]] = {}
        self._prior_logs: dict[str, np.ndarray] = {}

    def add(self, name: str, model: list[Any], losses: Mapping[str, Any]) -> None:
        """Keep what one member gave, and measure it on the development texts.

        Args:
            model: the loaded member.
            losses: domain -> the losses of its tokens [Q, S], torch fp32.
        """
        for domain, losses_QS in losses.items():
            self._logs.setdefault(domain, {})[name] = _logs_of(losses_QS)
        from megatron.training import get_args

        from megatron_btx.data.texts import start_of

        tokens = get_args().seq_length * PRIOR_SEQUENCES
        of_prior = []
        for domain, path in self.ensembles.prior_data.items():
            batches = batches_of(start_of(path, tokens), f"{_PRIOR} {domain}={path}")
            of_prior.append(_logs_of(forward(model, batches, keep_losses=True).losses_QS))
        if of_prior:
            self._prior_logs[name] = np.concatenate(of_prior)

    def measure(self, domain: str, ids: np.ndarray, micro: int) -> dict[str, Measured]:
        """Every ensemble on one text, by its name among the models.

        Args:
            ids: those that were evaluated.
            micro: sequences of a micro-batch, over which the standard error is taken as that of other models.
        """
        members = list(self.ensembles.texts)
        logs_NQS = np.stack([self._logs[domain][name] for name in members])
        _, sequences, length = logs_NQS.shape
        tokens_QS = ids[: sequences * length].reshape(sequences, length)
        prior_N = None
        if self._prior_logs:
            prior_N = cached_prior(np.stack([self._prior_logs[name] for name in members]))
        found = {}
        for kind in self.ensembles.weights:
            prior = prior_N if WEIGHTINGS[kind].needs_prior else None
            evidence = Evidence(tokens_QS, logs_NQS, self._nearness, prior, self.ensembles.interval)
            for k in self.ensembles.top_k:
                weights_NQS = WEIGHTS[kind](evidence, k)
                losses_QS = ensemble_losses(logs_NQS, weights_NQS)
                shares = weights_NQS[:, np.isfinite(losses_QS)].mean(axis=1).tolist()
                found[name_ensemble(kind, k)] = Measured(_mean(losses_QS, micro), shares)
        return found


def _logs_of(losses_QS: Any) -> np.ndarray:
    """Losses as log-probabilities, fp64."""
    return np.asarray(-losses_QS.double().numpy())


def _mean(losses_QS: np.ndarray, micro: int) -> MeanLoss:
    """The mean of the losses that count, as of any model."""
    batches = losses_QS.reshape(len(losses_QS) // micro, -1)
    tokens_B = np.isfinite(batches).sum(axis=1)
    sums_B = np.nansum(batches, axis=1)
    tokens = int(tokens_B.sum())
    mean = float(sums_B.sum() / tokens)
    stderr = None
    if len(batches) > 1:
        squares = ((sums_B - mean * tokens_B) ** 2).sum() * len(batches) / (len(batches) - 1)
        stderr = math.sqrt(squares) / tokens
    return MeanLoss(mean, tokens, stderr)
