"""The figures of an evaluation, against ones by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fake_scorer import Fake, probabilities, text

from doge_onnx.errors import QualityError
from doge_onnx.measure.evaluate import score


def test_figures_by_hand():
    ours = probabilities([0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.2, 0.4, 0.4])
    theirs = probabilities([0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.4, 0.4])
    # Predictions: 1 after 0, 2 after 1, 0 after 2; and 2 after 0. First tokens do not count.
    report = score(ours, theirs, text([0, 1, 2, 0], [0, 2]))
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.1 * math.log(0.5) + 0.8 * math.log(8 / 7)
    assert report.tokens == 4
    assert report.perplexity == pytest.approx((0.5 * 0.7 * 0.2 * 0.25) ** -0.25)
    assert report.reference_perplexity == pytest.approx((0.25 * 0.8 * 0.2 * 0.25) ** -0.25)
    assert report.mean_kl == pytest.approx((2 * first + second) / 4)
    assert report.max_kl == pytest.approx(first)
    assert (report.disagreements, report.top1_agreement) == (2, 0.5)
    for gap in (report.top2_gap_median, report.top2_gap_max, report.choice_gap_max):
        assert gap == pytest.approx(math.log(2))


def test_gaps_are_the_references_at_disagreements_alone():
    theirs = Fake([[3, 2, 0, 1], [0, 0, 0, 9], [5, 4.5, 4, -1], [0, 1, 2, 9]])
    ours = Fake([[0, 0, 9, 0], [0, 0, 0, 9], [0, 9, 0, 0], [9, 0, 0, 0]])
    report = score(ours, theirs, text([0, 1, 2, 3, 0]))
    # Disagreements after 0 (gaps 1 and 3), 2 (0.5 and 0.5), 3 (7 and 9), not after 1.
    assert (report.disagreements, report.top1_agreement) == (3, 0.25)
    assert (report.top2_gap_median, report.top2_gap_max) == (1, 7)
    assert (report.choice_gap_median, report.choice_gap_max) == (3, 9)


# Around the number of positions that are taken at once, and several times as many.
@pytest.mark.parametrize("length", [2, 64, 65, 66, 129, 200])
def test_windows_of_any_length_have_the_figures_of_all_their_positions(length):
    rng = np.random.default_rng(1)
    ours, theirs = (Fake(rng.normal(size=(50, 50)) * 3) for _ in range(2))
    ids = rng.integers(50, size=(2, length)).tolist()
    report = score(ours, theirs, text(*ids))
    log_p, log_q = (
        model.table - np.log(np.exp(model.table.astype(float)).sum(-1, keepdims=True))
        for model in (theirs, ours)
    )
    past = np.array(ids)[:, :-1].ravel()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[past].mean()
    assert report.mean_kl == pytest.approx(kl)
    assert report.tokens == 2 * (length - 1)


def test_a_model_is_its_own_perfect_copy():
    model = Fake(np.random.default_rng(2).normal(size=(20, 20)))
    report = score(model, model, text(list(range(20))))
    assert (report.mean_kl, report.max_kl, report.top1_agreement) == (0, 0, 1)
    assert (report.disagreements, report.top2_gap_median, report.choice_gap_max) == (0, None, None)
    assert report.perplexity == report.reference_perplexity
    report.require(0, "it")


def test_without_a_reference_nothing_is_compared():
    report = score(probabilities([0.5, 0.5], [0.25, 0.75]), None, text([0, 1, 1]))
    assert report.perplexity == pytest.approx((0.5 * 0.75) ** -0.5)
    compared = (report.reference, report.reference_perplexity, report.mean_kl, report.max_kl)
    assert set(compared) == {None}
    with pytest.raises(QualityError, match=r"it is too far from a reference: .* unknown"):
        report.require(1, "it")


def test_the_threshold():
    report = replace(score(Fake(np.eye(2)), Fake(np.eye(2)), text([0, 1])), mean_kl=0.25)
    report.require(0.25, "it")
    for mean_kl, words in ((0.2501, "0.25 nats"), (math.nan, "nan"), (math.inf, "inf")):
        with pytest.raises(QualityError, match=f"some/it is too far from fake: .*{words}.*0.25"):
            replace(report, mean_kl=mean_kl).require(0.25, "some/it")


@pytest.mark.filterwarnings("error")
def test_figures_that_are_no_numbers_are_none_in_the_manifest():
    broken = Fake([[math.nan, 0], [0, 0]])
    report = score(broken, Fake(np.eye(2)), text([0, 1, 0]))
    figures = report.as_dict()
    assert figures["perplexity"] is figures["mean_kl"] is None
    assert figures["reference_perplexity"] == report.reference_perplexity
    json.dumps(figures, allow_nan=False)
    # A loss too large for a perplexity.
    assert score(Fake([[0, -1e4], [0, 0]]), None, text([0, 1])).as_dict()["perplexity"] is None


def test_time_ends_an_evaluation_after_a_whole_window():
    model = Fake(np.eye(3))
    assert score(model, None, text([0, 1, 2], [0, 1, 2]), max_seconds=0).tokens == 2
    assert score(model, None, text([0, 1, 2], [0, 1, 2]), max_seconds=100).tokens == 4


def test_a_slow_machine_reads_the_least_tokens_all_the_same():
    windows = [[0, 1, 2]] * 5
    for least, predicted in ((0, 2), (3, 2), (4, 4), (9, 6), (100, 10)):
        report = score(Fake(np.eye(3)), None, text(*windows), max_seconds=0, min_tokens=least)
        assert report.tokens == predicted
