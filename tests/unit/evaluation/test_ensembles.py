"""Branch-Train-Merge's weights and losses, against the papers' formulas written out one number at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megatron_btx.common.ensembles import WEIGHTINGS
from megatron_btx.evaluation.ensembles import (
    CLUSTER_TEMPERATURE,
    CONTEXT_INTERVAL,
    PRIOR_DECAY,
    WEIGHTS,
    Evidence,
    Nearness,
    cached_prior,
    ensemble_losses,
)

VOCABULARY, LENGTH = 30, 3 * CONTEXT_INTERVAL
MEMBERS, SEQUENCES = 4, 5


@pytest.fixture(scope="module")
def texts():
    """Three texts of overlapping vocabularies, some documents of each."""
    random = np.random.default_rng(1)
    return [[random.integers(low, low + 14, random.integers(1, 60)) for _ in range(9)] for low in (0, 8, 16)]


SHARES_NT = np.array([[1, 0, 0], [0.1, 0.9, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]])


@pytest.fixture(scope="module")
def evidence(texts):
    random = np.random.default_rng(2)
    logs_NQS = np.log(random.uniform(0.01, 1, (MEMBERS, SEQUENCES, LENGTH)))
    logs_NQS[:, 2, 7] = np.nan  # does not count
    tokens_QS = random.integers(0, VOCABULARY, (SEQUENCES, LENGTH))
    tokens_QS[1] = random.integers(8, 22, LENGTH)
    return Evidence(tokens_QS, logs_NQS, Nearness(texts, SHARES_NT, VOCABULARY))


def plain_vector(document, idf):
    """A document's tf-idf, of length one."""
    counts = Counter(document.tolist())
    vector = [counts[term] * idf[term] for term in range(VOCABULARY)]
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def plain_similarities(texts, context):
    """The cosines of one context with the members, as scikit-learn's documentation defines tf-idf."""
    documents = [document for text in texts for document in text]
    having = [sum(term in document for document in documents) for term in range(VOCABULARY)]
    idf = [math.log((1 + len(documents)) / (1 + count)) + 1 for count in having]
    means = [np.mean([plain_vector(document, idf) for document in text], axis=0) for text in texts]
    found = []
    for shares in SHARES_NT:
        center = sum(share * mean for share, mean in zip(shares, means, strict=True))
        found.append(float(plain_vector(context, idf) @ center / np.linalg.norm(center)))
    return found


def test_the_nearest_members_are_those_of_a_plain_reference(texts, evidence):
    for kept in (1, 2, 4):
        weights_NQS = WEIGHTS["tf-idf"](evidence, kept)
        assert np.allclose(weights_NQS[:, :, :CONTEXT_INTERVAL], 1 / MEMBERS)  # no context yet
        for sequence in range(SEQUENCES):
            for start in (CONTEXT_INTERVAL, 2 * CONTEXT_INTERVAL):
                near = plain_similarities(texts, evidence.tokens_QS[sequence, : start + 1])
                first = sorted(range(MEMBERS), key=lambda member: (-near[member], member))[:kept]
                expected = [1 / kept if member in first else 0.0 for member in range(MEMBERS)]
                part_NS = weights_NQS[:, sequence, start : start + CONTEXT_INTERVAL]
                assert part_NS.T.tolist() == [expected] * CONTEXT_INTERVAL


def test_a_context_sees_nothing_of_what_follows(evidence):
    """Another token at a place changes no weight up to there, whatever weighs."""
    place = CONTEXT_INTERVAL + 5
    other = Evidence(evidence.tokens_QS.copy(), evidence.logs_NQS.copy(), evidence.nearness)
    other.tokens_QS[:, place + 1 :] = 0
    other.logs_NQS[:, :, place:] = math.log(0.5)
    other.logs_NQS[0, :, place:] = math.log(0.9)
    for name, weigh in WEIGHTS.items():
        for kept in (1, 3):
            before, after = weigh(evidence, kept), weigh(other, kept)
            if name == "bayes-updating":  # whose prior follows earlier sequences, as it should
                before, after = before[:, :1], after[:, :1]
            assert np.array_equal(before[:, :, : place + 1], after[:, :, : place + 1]), name


def test_distances_weigh_as_the_formula_says(texts, evidence):
    weights_NQS = WEIGHTS["cluster"](evidence, 3)
    place = 2 * CONTEXT_INTERVAL
    near = plain_similarities(texts, evidence.tokens_QS[1, : place + 1])
    raw = [math.exp(-(2 - 2 * similarity) / CLUSTER_TEMPERATURE) for similarity in near]
    raw[near.index(min(near))] = 0.0
    assert np.allclose(weights_NQS[:, 1, place + 3], [value / sum(raw) for value in raw], rtol=1e-9)


def plain_posterior(prior, logs_N):
    joint = [p * math.exp(log) for p, log in zip(prior, logs_N, strict=True)]
    return [value / sum(joint) for value in joint]


def test_the_posterior_is_that_of_bayes(evidence):
    logs_NQS = np.nan_to_num(evidence.logs_NQS)
    weights_NQS = WEIGHTS["bayes"](evidence, MEMBERS)
    for place in (0, 1, 9, LENGTH - 1):
        expected = plain_posterior([1.0] * MEMBERS, logs_NQS[:, 2, :place].sum(axis=1))
        assert np.allclose(weights_NQS[:, 2, place], expected, rtol=1e-9)
    prior = [0.7, 0.1, 0.1, 0.1]
    cached = Evidence(evidence.tokens_QS, evidence.logs_NQS, prior_N=np.log(prior))
    expected = plain_posterior(prior, logs_NQS[:, 0, :4].sum(axis=1))
    assert np.allclose(WEIGHTS["bayes-cached"](cached, MEMBERS)[:, 0, 4], expected, rtol=1e-9)
    of_sequences = [plain_posterior([1.0] * MEMBERS, logs_NQS[:, q].sum(axis=1)) for q in range(SEQUENCES)]
    assert np.allclose(np.exp(cached_prior(evidence.logs_NQS)), np.mean(of_sequences, axis=0), rtol=1e-9)


def test_the_prior_follows_the_text(evidence):
    """After n sequences the prior is the sum of their posteriors, the one before last times .3, and so on."""
    short = Evidence(evidence.tokens_QS, 0.01 * evidence.logs_NQS)
    logs_NQS = np.nan_to_num(short.logs_NQS)
    weights_NQS = WEIGHTS["bayes-updating"](short, MEMBERS)
    posteriors: list[list[float]] = []
    for sequence in range(SEQUENCES):
        prior = [1.0] * MEMBERS
        if posteriors:
            ages = [PRIOR_DECAY**age for age in reversed(range(len(posteriors)))]
            prior = [sum(age * each[n] for age, each in zip(ages, posteriors, strict=True)) for n in range(MEMBERS)]
        found = plain_posterior(prior, logs_NQS[:, sequence, :50].sum(axis=1))
        assert np.allclose(weights_NQS[:, sequence, 50], found, rtol=1e-9)
        posteriors.append(plain_posterior(prior, logs_NQS[:, sequence].sum(axis=1)))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", [1, 2, MEMBERS])
def test_weights_are_a_distribution_over_at_most_so_many(name, kept, evidence):
    weights_NQS = WEIGHTS[name](evidence, kept)
    assert np.allclose(weights_NQS.sum(axis=0), 1, rtol=1e-12) and (weights_NQS >= 0).all()
    begun = weights_NQS[:, :, CONTEXT_INTERVAL:]
    if name != "uniform":
        assert ((begun > 0).sum(axis=0) <= kept).all()


def test_of_equal_members_the_first_is_taken(texts):
    """Two members of one text are equally near; a context without a known term is equally far from all."""
    twins = Nearness(texts[:1], np.array([[1.0], [1.0]]), VOCABULARY)
    tokens_QS = np.full((1, LENGTH), 3)
    weights_NQS = WEIGHTS["tf-idf"](Evidence(tokens_QS, np.zeros((2, 1, LENGTH)), twins), 1)
    assert weights_NQS[:, 0, -1].tolist() == [1, 0]
    assert twins.similarities([np.array([], dtype=np.int64)]).tolist() == [[0, 0]]


def test_the_loss_is_that_of_the_mean_distribution(evidence):
    logs_NQS = evidence.logs_NQS
    one = np.zeros((MEMBERS, 1, 1))
    one[2] = 1
    assert np.array_equal(ensemble_losses(logs_NQS, np.broadcast_to(one, logs_NQS.shape)), -logs_NQS[2], equal_nan=True)
    mean = ensemble_losses(logs_NQS, WEIGHTS["uniform"](evidence, 1))
    assert np.allclose(mean, -np.log(np.exp(logs_NQS).mean(axis=0)), atol=1e-12, equal_nan=True)
    assert np.isnan(mean[2, 7]) and np.isfinite(mean).sum() == mean.size - 1


def test_every_weighting_is_implemented():
    assert list(WEIGHTS) == list(WEIGHTINGS)
