"""Branch-Train-Merge: no mixture is made, and the distributions of the experts' next tokens are averaged.

What decides an expert's weight is one function of :data:`WEIGHTS`. The loss of an ensemble needs of each member the
log-probability of every token that came, so that members are evaluated one after the other, in any layout.

Axes: ``N`` members, ``Q`` sequences, ``S`` places in a sequence, ``D`` documents, ``V`` vocabulary. The weights at a
place are those of the token that follows there, and depend on what stands before it in its sequence alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_btx.common.ensembles import ALIKE, NEAREST

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CONTEXT_INTERVAL = 32
CLUSTER_TEMPERATURE = 0.1
"""Of c-BTM (Gururangan et al. 2023, arXiv 2303.14177, section 3)."""
PRIOR_DECAY = 0.3
"""Of the moving average of posteriors (Li et al. 2022, arXiv 2208.03306, section 4; DEMix, arXiv 2108.05036)."""
PRIOR_SEQUENCES = 100
"""Sequences of the development text whose posteriors make a cached prior, as in the same papers."""


@dataclass(frozen=True)
class Evidence:
    """What is known of one text and of the members when weights are chosen."""

    tokens_QS: np.ndarray
    """Ids that the members read, integers."""
    logs_NQS: np.ndarray
    """Log-probability in nats, fp64, that each member gave to the token that followed; NaN where it does not count."""
    nearness: Nearness | None = None
    """None where no training text is known."""
    prior_N: np.ndarray | None = None
    """Log of a cached prior; None: all members alike."""
    interval: int = CONTEXT_INTERVAL
    """Places after which the nearest members are sought again; those before the first have no context but one token."""


class Nearness:
    """How near a context is to the training text of each member, by tf-idf of token ids.

    The ids are the terms: members of one run share a vocabulary, and what they are trained on is stored as ids. The
    inverse document frequencies are those of all given documents. A member is the mean of its documents' vectors.

    Args:
        documents: of each text, the token ids of its documents.
        shares_NT: how much of each member's training each text was, [N, T]; a row sums to one.
        vocabulary: ids are below it.
    """

    def __init__(self, documents: Sequence[Sequence[np.ndarray]], shares_NT: np.ndarray, vocabulary: int) -> None:
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.preprocessing import normalize

        self._vocabulary = vocabulary
        counts = [count_terms(of_text, vocabulary) for of_text in documents]
        self._transformer = TfidfTransformer().fit(vstack(counts))
        means_TV = np.stack([np.asarray(self._transformer.transform(each).mean(axis=0)).ravel() for each in counts])
        self.centers_NV = normalize(shares_NT @ means_TV)

    def similarities(self, contexts: Sequence[np.ndarray]) -> np.ndarray:
        """The cosine of every context with every member, [contexts, N]; 0 for an empty context."""
        vectors = self._transformer.transform(count_terms(contexts, self._vocabulary))
        return np.asarray(vectors @ self.centers_NV.T)

    def similarities_along(self, tokens_QS: np.ndarray, interval: int) -> np.ndarray:
        """The cosines at every place with what stands up to there, renewed every interval, [N, Q, S]; NaN before."""
        sequences, length = tokens_QS.shape
        found_NQS = np.full((len(self.centers_NV), sequences, length), np.nan)
        for start in range(interval, length, interval):
            near_QN = self.similarities(list(tokens_QS[:, : start + 1]))
            found_NQS[:, :, start : start + interval] = near_QN.T[:, :, None]
        return found_NQS


def count_terms(documents: Iterable[np.ndarray], vocabulary: int) -> csr_array:
    """How often every id stands in every document, [D, V]."""
    from scipy.sparse import csr_array

    listed = list(documents)
    rows = np.repeat(np.arange(len(listed)), [len(ids) for ids in listed])
    columns = np.concatenate([*listed, np.empty(0, dtype=np.int64)]).astype(np.int64)
    counts = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(listed), vocabulary))
    counts.sum_duplicates()
    return counts


def keep_first(scores_NQS: np.ndarray, kept: int) -> np.ndarray:
    """Whether a member is among the ``kept`` with the highest scores; of equal ones the earlier member is. [N, Q, S]"""
    order = np.argsort(-scores_NQS, axis=0, kind="stable")
    ranks = np.argsort(order, axis=0, kind="stable")
    return np.asarray(ranks < kept)


def weigh_by_nearness(evidence: Evidence, kept: int) -> np.ndarray:
    """The nearest members alike (BTX, arXiv 2403.07816, section 4.1); where there is no context yet, all alike."""
    near_NQS = _similarities(evidence)
    return _share_out(keep_first(np.nan_to_num(near_NQS), kept).astype(float), near_NQS)


def weigh_by_distance(evidence: Evidence, kept: int) -> np.ndarray:
    """The nearest members by exp(-distance^2 / T), between unit vectors (c-BTM, arXiv 2303.14177, equation 2)."""
    near_NQS = _similarities(evidence)
    distances_NQS = 2 - 2 * np.nan_to_num(near_NQS)
    weights_NQS = np.exp(-(distances_NQS - distances_NQS.min(axis=0)) / CLUSTER_TEMPERATURE)
    return _share_out(weights_NQS * keep_first(-distances_NQS, kept), near_NQS)


def _similarities(evidence: Evidence) -> np.ndarray:
    assert evidence.nearness is not None
    return evidence.nearness.similarities_along(evidence.tokens_QS, evidence.interval)


def _share_out(weights_NQS: np.ndarray, near_NQS: np.ndarray) -> np.ndarray:
    """The weights so that they sum to one; all alike where no similarity is known."""
    weights_NQS = np.where(np.isnan(near_NQS), 1.0, weights_NQS)
    return np.asarray(weights_NQS / weights_NQS.sum(axis=0))


def weigh_alike(evidence: Evidence, kept: int) -> np.ndarray:
    """Every member alike, the plain mean of their distributions; takes no notice of ``kept``."""
    return np.full(evidence.logs_NQS.shape, 1 / len(evidence.logs_NQS))


def weigh_by_posterior(evidence: Evidence, kept: int) -> np.ndarray:
    """How probable it is that a sequence so far is of a member's domain, by Bayes from an even or cached prior."""
    prior_N = evidence.prior_N
    if prior_N is None:
        prior_N = np.zeros(len(evidence.logs_NQS))
    return _exponentiate(prior_N[:, None, None] + _likelihoods(evidence.logs_NQS), kept)


def weigh_by_running_posterior(evidence: Evidence, kept: int) -> np.ndarray:
    """The same from a prior that follows the text: a moving average of the posteriors of the sequences before."""
    before_NQS = _likelihoods(evidence.logs_NQS)
    ends_NQ = np.nansum(evidence.logs_NQS, axis=2)
    priors_NQ = np.zeros(ends_NQ.shape)
    average_N = np.full(len(ends_NQ), -np.inf)
    for number, ends_N in enumerate(ends_NQ.T):
        if number:
            priors_NQ[:, number] = average_N
        posterior_N = _log_normalize(priors_NQ[:, number] + ends_N)
        average_N = np.logaddexp(average_N + np.log(PRIOR_DECAY), posterior_N)
    return _exponentiate(priors_NQ[:, :, None] + before_NQS, kept)


def cached_prior(logs_NQS: np.ndarray) -> np.ndarray:
    """The log of the members' mean posterior over sequences of a development text, each from an even prior. [N]"""
    posteriors_NQ = _log_normalize(np.nansum(logs_NQS, axis=2))
    return np.asarray(_log_normalize(np.logaddexp.reduce(posteriors_NQ, axis=1)))


def _likelihoods(logs_NQS: np.ndarray) -> np.ndarray:
    """Log-probability of what follows each sequence's first token, up to each place and without what comes there."""
    sums_NQS = np.cumsum(np.nan_to_num(logs_NQS), axis=2)
    before_NQS = np.zeros(logs_NQS.shape)
    before_NQS[:, :, 1:] = sums_NQS[:, :, :-1]
    return before_NQS


def _exponentiate(scores_NQS: np.ndarray, kept: int) -> np.ndarray:
    """Scores in nats as weights of the first ``kept``."""
    weights_NQS = np.exp(scores_NQS - scores_NQS.max(axis=0)) * keep_first(scores_NQS, kept)
    return np.asarray(weights_NQS / weights_NQS.sum(axis=0))


def _log_normalize(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=0))


def ensemble_losses(logs_NQS: np.ndarray, weights_NQS: np.ndarray) -> np.ndarray:
    """Cross-entropy of the weighted mean of the members' distributions, nats per token, [Q, S]; NaN as given."""
    with np.errstate(divide="ignore", invalid="ignore"):  # weights of zero, and losses that do not count
        return np.asarray(-np.logaddexp.reduce(logs_NQS + np.log(weights_NQS), axis=0))


WEIGHTS: dict[str, Callable[[Evidence, int], np.ndarray]] = {
    NEAREST: weigh_by_nearness,
    "cluster": weigh_by_distance,
    ALIKE: weigh_alike,
    "bayes": weigh_by_posterior,
    "bayes-updating": weigh_by_running_posterior,
    "bayes-cached": weigh_by_posterior,
}
"""Name, as in :data:`megatron_btx.common.ensembles.WEIGHTINGS` -> what gives weights [N, Q, S] of the evidence and a
number K: they sum to one over the members, and are zero for all but K of them."""
