"""Evaluations: texts that can be repeated, what is compared, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import fake_bundle
import numpy as np
import onnx
import pytest
import torch
from commands import assert_one_line_error, invoke
from conftest import TINY_CHECKPOINT
from fake_scorer import Fake, probabilities, text
from fresh_python import EXTRA, run
from onnx import numpy_helper

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx.bundle import GRAPH_NAME, Bundle
from doge_onnx.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    InputError,
    QualityError,
)
from doge_onnx.export import card, quality
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.export.eager import EagerModel
from doge_onnx.measure import evaluate as evaluator
from doge_onnx.measure.evaluate import BundleScorer, evaluate, score

TOKENS = 200
WORDS = "the cat and the dog and the hat sat on the mat, and then the cat ran. " * 20


# --- sampled texts ----------------------------------------------------------------------------


def sample(model, *arguments):
    return model.sample(*arguments).tolist()


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return BundleScorer(tiny_bundle)


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints.read(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def eager(checkpoint):
    return EagerModel(checkpoint, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "eager"])
def test_a_seed_makes_a_text_and_every_row_another(name, request):
    model = request.getfixturevalue(name)
    texts = sample(model, 5, 3, 20)
    assert sample(model, 5, 3, 20) == texts
    assert sample(model, 5, 1, 20, 2) == texts[2:]
    assert sample(model, 6, 3, 20) != texts
    assert len({tuple(row) for row in texts}) == 3
    # Begins with bos and holds no eos.
    assert {row[0] for row in texts} == {0}
    assert all(0 <= token < 4096 and token != 1 for row in texts for token in row)


def test_both_halves_write_the_same_text(tiny, eager):
    assert sample(tiny, 5, 2, 20) == sample(eager, 5, 2, 20)


def test_texts_follow_the_models_probabilities():
    model = probabilities([0.1, 0.9], [0.6, 0.4])
    texts = model.sample(1, 100, 100)
    assert texts[:, 1:][texts[:, :-1] == 0].mean() == pytest.approx(0.9, abs=0.02)
    assert texts[:, 1:][texts[:, :-1] == 1].mean() == pytest.approx(0.4, abs=0.02)


def test_what_ends_a_text_is_never_chosen_and_may_be_unknown():
    table = np.zeros((6, 6), np.float32)
    step = lambda tokens, _: (table[tokens], None)  # noqa: E731
    texts = evaluator.sample_text(step, 3, {2, 4, 77}, 6, 0, range(20), 30)
    assert set(texts.ravel().tolist()) == {0, 1, 3, 5}


def test_without_bos_texts_begin_anywhere():
    table = np.zeros((50, 50), np.float32)
    step = lambda tokens, _: (table[tokens], None)  # noqa: E731
    texts = evaluator.sample_text(step, None, (), 50, 0, range(20), 2)
    assert len(set(texts[:, 0].tolist())) > 10


def test_a_model_without_numbers_writes_nothing():
    with pytest.raises(QualityError, match="writes no text"):
        Fake([[0, math.nan]]).sample(0, 1, 2)


def test_a_sampled_text_has_as_many_windows_as_fit():
    model = Fake(np.zeros((4, 4)))
    for window, most, shape in ((8, 100, (12, 8)), (8, 400, (50, 8)), (8, 5, (1, 5))):
        written = evaluator.sampled_text(model, 3, window, most)
        windows = list(written.windows)
        assert (len(windows), len(windows[0])) == shape
        assert written.window == shape[1]
        # However many are written at once.
        assert windows == sample(model, 3, shape[0], shape[1])


# --- PyTorch ----------------------------------------------------------------------------------


def test_the_eager_model_leaves_the_checkpoint_alone(checkpoint):
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    threads = torch.get_num_threads()
    EagerModel(checkpoint, 16).sample(0, 2, 4)
    assert torch.get_num_threads() == threads
    assert checkpoint.tensors.keys() == before.keys()
    assert all(torch.equal(checkpoint.tensors[name], before[name]) for name in before)


def test_the_eager_model_has_the_bundles_logits(tiny, eager):
    ids = sample(eager, 1, 1, 40)[0]
    ours, theirs = tiny.logits(ids), eager.logits(ids)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape == (40, 4096)
    assert np.abs(ours - theirs).max() < 1e-3
    _, past = eager.advance(torch.tensor([ids[:30]]), None)
    rest, _ = eager.advance(torch.tensor([ids[30:]]), past)
    assert np.abs(rest[0].numpy() - theirs[30:]).max() < 1e-3


# --- bundles ----------------------------------------------------------------------------------


def perturb(path: Path, strength: float) -> Path:
    """Add noise to every large matrix of a bundle's graph."""
    model = onnx.load(path / GRAPH_NAME)
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2 and values.size > 10_000:
            noise = rng.normal(size=values.shape) * values.std() * strength
            tensor.CopyFrom(numpy_helper.from_array((values + noise).astype("f4"), tensor.name))
    onnx.save(model, path / GRAPH_NAME)
    bundles.seal(path, bundles.read_manifest(path))
    return path


@pytest.fixture(scope="module")
def worse(tiny_bundle, tmp_path_factory):
    copy = tmp_path_factory.mktemp("worse") / "bundle"
    return perturb(Path(shutil.copytree(tiny_bundle, copy)), 0.1)


def test_a_bundle_against_itself_and_against_a_better_one(tiny_bundle, worse):
    same = doge_onnx.evaluate(tiny_bundle, tiny_bundle, max_tokens=TOKENS)
    assert (same.mean_kl, same.top1_agreement, same.seed) == (0, 1, evaluator.DEFAULT_SEED)
    assert same.perplexity == same.reference_perplexity < 200
    other = doge_onnx.evaluate(worse, tiny_bundle, max_tokens=TOKENS)
    assert (other.tokens, other.reference_perplexity) == (same.tokens, same.perplexity)
    assert other.tokens == TOKENS - 1
    assert 0.001 < other.mean_kl < other.max_kl
    assert other.perplexity > other.reference_perplexity
    assert 0.5 < other.top1_agreement < 1
    assert 0 < other.top2_gap_median <= other.top2_gap_max <= other.choice_gap_max
    assert other.reference == f"{tiny_bundle} (fp32)"
    assert doge_onnx.evaluate(worse, tiny_bundle, max_tokens=TOKENS) == other
    again = doge_onnx.evaluate(worse, tiny_bundle, max_tokens=TOKENS, seed=1)
    assert again.mean_kl != other.mean_kl


def test_a_bundle_against_its_checkpoint(tiny_bundle, worse):
    said: list[str] = []
    report = doge_onnx.evaluate(
        tiny_bundle, TINY_CHECKPOINT, max_tokens=TOKENS, progress=said.append
    )
    assert report.mean_kl < 1e-9
    assert report.reference == "doge-tiny in PyTorch, float32"
    assert report.text == f"sampled from {report.reference}"
    assert said[0] == "loading the reference"
    assert doge_onnx.evaluate(worse, TINY_CHECKPOINT, max_tokens=TOKENS).mean_kl > 0.001


def test_an_evaluation_changes_nothing(tiny_bundle):
    before = {path: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()}
    doge_onnx.evaluate(tiny_bundle, max_tokens=20)
    assert {path: path.stat().st_mtime_ns for path in tiny_bundle.iterdir()} == before


def test_a_text_is_cut_into_windows(tiny_bundle, tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    ids = tiny.encode(WORDS)
    assert len(ids) > 301
    report = doge_onnx.evaluate(tiny_bundle, text=file, max_tokens=301, window=100)
    # The token at the end is alone in its window, and so not predicted.
    expected = score(tiny, None, text(ids[:100], ids[100:200], ids[200:300]))
    assert report == replace(expected, text=str(file))
    assert (report.tokens, report.window, report.seed) == (297, 100, None)
    report = doge_onnx.evaluate(tiny_bundle, tiny_bundle, file)
    assert (report.window, report.mean_kl) == (evaluator.FILE_WINDOW, 0)


def test_windows_never_exceed_a_context(tmp_path):
    path = fake_bundle.write(tmp_path / "b")
    report = doge_onnx.evaluate(path, path, window=5000, max_tokens=650)
    assert report.window == fake_bundle.CONTEXT
    assert report.tokens == 2 * (fake_bundle.CONTEXT - 1)
    short = Fake(np.zeros((fake_bundle.VOCAB, fake_bundle.VOCAB)))
    short.context_length = 10
    assert evaluate(BundleScorer(path), short, max_tokens=50).window == 10


def test_a_checkpoint_gets_no_longer_a_context_than_its_bundle(tmp_path, monkeypatch):
    asked = []

    def open_checkpoint(reference, context_length, **_):
        asked.append(context_length)
        raise InputError("enough")

    monkeypatch.setattr(quality, "open_checkpoint", open_checkpoint)
    path = fake_bundle.write(tmp_path / "b")
    for window in (8, 2**20, None):
        with pytest.raises(InputError, match="enough"):
            doge_onnx.evaluate(path, TINY_CHECKPOINT, window=window)
    assert asked == [8, fake_bundle.CONTEXT, fake_bundle.CONTEXT]


def test_a_context_of_one_token_has_nothing_to_predict(tmp_path):
    path = fake_bundle.write(tmp_path / "b", context_length=1)
    with pytest.raises(InputError, match="nothing to predict"):
        doge_onnx.evaluate(path)


@pytest.mark.slow
def test_a_window_state_is_read_past_its_window(main_checkpoint, tmp_path):
    wide = Path(shutil.copytree(main_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"keep_window_size": 12}))
    path = tmp_path / "bundle"
    doge_onnx.export(wide, path, state="window", verify=False)
    report = doge_onnx.evaluate(path, wide, window=40, max_tokens=80)
    assert (report.window, report.tokens) == (40, 78)
    assert report.mean_kl < 1e-6


def test_a_bundle_without_tokenizer_reads_no_text(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    (tmp_path / "text").write_text("a text")
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        doge_onnx.evaluate(path, text=tmp_path / "text")
    # config.json names no bos either.
    assert doge_onnx.evaluate(path, path, max_tokens=40).mean_kl == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "less than two tokens"),
        (b"\xff\xfe a text", "not UTF-8"),
        (None, "cannot read"),
    ],
    ids=["empty", "not text", "missing"],
)
def test_texts_that_are_none(tiny_bundle, tmp_path, content, words):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        doge_onnx.evaluate(tiny_bundle, text=file)
    assert str(file) in str(error.value)


def test_a_directory_or_a_senseless_name_is_no_text(tiny_bundle, tmp_path):
    for name in (tmp_path, "nul\0byte"):
        with pytest.raises(InputError, match="cannot read"):
            doge_onnx.evaluate(tiny_bundle, text=name)


def test_of_a_long_file_only_the_beginning_is_read(tiny_bundle, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(WORDS.encode() * 10 + b"\xff")
    assert doge_onnx.evaluate(tiny_bundle, text=file, max_tokens=20).tokens == 19


def test_references_that_do_not_fit(tiny_bundle, tmp_path):
    other = fake_bundle.write(tmp_path / "other")
    with pytest.raises(InputError, match=f"vocabulary of {fake_bundle.VOCAB} tokens"):
        doge_onnx.evaluate(tiny_bundle, other)
    with pytest.raises(CheckpointError, match="neither a directory nor"):
        doge_onnx.evaluate(tiny_bundle, tmp_path / "missing")
    with pytest.raises(ConfigError):
        doge_onnx.evaluate(tiny_bundle, tmp_path)
    with pytest.raises(BundleError):
        doge_onnx.evaluate(tmp_path / "missing")
    (other / GRAPH_NAME).write_bytes(b"")
    with pytest.raises(BundleError, match="does not have the size"):
        doge_onnx.evaluate(tiny_bundle, other)
    for reference in (None, tiny_bundle):
        with pytest.raises(InputError, match="only a reference on the Hub has a revision"):
            doge_onnx.evaluate(tiny_bundle, reference, reference_revision="main")
    with pytest.raises(InputError, match="nothing else has a revision"):
        doge_onnx.evaluate(tiny_bundle, revision="main")


@pytest.mark.parametrize("option", ["window", "max_tokens", "seed"])
@pytest.mark.parametrize("value", [-1, 1.5, "9", True])
def test_options_out_of_range(option, value):
    with pytest.raises(InputError, match=f"{option} must be a whole number"):
        doge_onnx.evaluate("nowhere", **{option: value})


def test_a_bundle_is_evaluated_without_the_export_extra(tmp_path):
    path = str(fake_bundle.write(tmp_path / "b"))
    code = f"""
        import doge_onnx
        print(doge_onnx.evaluate({path!r}, {path!r}, max_tokens=20).mean_kl)
        try:
            doge_onnx.evaluate({path!r}, {str(TINY_CHECKPOINT)!r})
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    output = run(code, blocked=EXTRA)
    assert output.startswith("0.0\nthis needs ")
    assert "pip install 'doge-onnx[export]'" in output


# --- what an export records -------------------------------------------------------------------


def test_measure_gives_what_an_evaluation_gives(worse, checkpoint, monkeypatch):
    monkeypatch.setattr(quality, "DEFAULT_TOKENS", TOKENS)
    report = quality.measure(worse, checkpoint)
    assert report.reference == "the checkpoint in PyTorch, float32"
    other = doge_onnx.evaluate(worse, TINY_CHECKPOINT, max_tokens=TOKENS)
    assert report.mean_kl == pytest.approx(other.mean_kl)
    assert checkpoint.tensors


def test_large_models_get_less_text_and_less_time(tiny_bundle, checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(quality, "evaluate", lambda *_, **options: asked.append(options))
    for parameters, tokens in ((20_000_000, 8192), (300_000_000, 2000), (3_000_000_000, 1024)):
        assert quality.affordable_tokens(parameters) == tokens
    quality.measure(tiny_bundle, checkpoint, max_seconds=7)
    (options,) = asked
    assert options["max_tokens"] == quality.affordable_tokens(checkpoint.parameters)
    assert (options["max_seconds"], options["min_tokens"]) == (7, 1024)


def test_the_card_and_the_manifest_show_the_figures(tiny_bundle, checkpoint, tmp_path):
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    before = (copy / "README.md").read_text(encoding="utf-8")
    assert "Quality" not in before
    assert "Quality" not in invoke("info", copy).stdout
    report = evaluate(BundleScorer(copy), EagerModel(checkpoint, 64), max_tokens=TOKENS)
    manifest = replace(Bundle.open(copy).manifest, quality=report.as_dict())
    draft = Bundle.draft(copy, manifest)
    card.write(checkpoints.find(TINY_CHECKPOINT), checkpoint.config, {}, draft)
    bundles.seal(copy, manifest)
    opened = Bundle.open(copy)
    assert opened.manifest.quality == report.as_dict()
    shown = (copy / "README.md").read_text(encoding="utf-8")
    assert f"| mean KL divergence, nats per token | {report.mean_kl:.3g} |\n" in shown
    assert "| top-1 agreement | 100.00% |\n" in shown
    assert "logits | - in the median, - at most |\n" in shown
    start, end = shown.index("## Quality"), shown.index("## The graph")
    assert shown[:start] + shown[end:] == before
    assert f"mean kl  {'':10}" in invoke("info", copy).stdout


# --- the command line -------------------------------------------------------------------------


def test_eval_prints_the_figures(tiny_bundle, worse):
    result = invoke("eval", worse, "--reference", tiny_bundle, "--max-tokens", TOKENS)
    assert result.exit_code == 0, result.output
    report = doge_onnx.evaluate(worse, tiny_bundle, max_tokens=TOKENS)
    for line in (
        f"{report.perplexity:.4g}",
        f"{report.mean_kl:.3g} nats per token",
        f"{report.top1_agreement:.2%}",
        f"{report.top2_gap_median:.3g} in the median, {report.top2_gap_max:.3g} at most",
        f"{report.choice_gap_median:.3g} in the median",
        f"{report.tokens:,} in windows of {report.window}",
        f"seed {report.seed}",
    ):
        assert line in result.stdout
    assert "evaluating" in result.stderr.splitlines()[0]


def test_eval_without_reference_prints_no_comparison(tiny_bundle):
    result = invoke("eval", tiny_bundle, "--max-tokens", 20)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "KL" not in result.stdout
    assert "gap" not in result.stdout


def test_eval_as_json_passes_every_option_on(tiny_bundle, tmp_path):
    file = tmp_path / "text"
    file.write_text(WORDS)
    options = ["--text", file, "--max-tokens", 90, "--window", 30, "--seed", 4, "--json"]
    result = invoke("eval", tiny_bundle, "--reference", tiny_bundle, *options)
    assert result.exit_code == 0, result.output
    expected = doge_onnx.evaluate(tiny_bundle, tiny_bundle, file, max_tokens=90, window=30)
    assert json.loads(result.stdout) == expected.as_dict()
    result = invoke("eval", tiny_bundle, "--max-tokens", 30, "--seed", 4, "--json")
    expected = doge_onnx.evaluate(tiny_bundle, max_tokens=30, seed=4)
    assert json.loads(result.stdout) == expected.as_dict()


def test_eval_fails_beyond_the_threshold(tiny_bundle, worse):
    arguments = ["eval", worse, "--reference", tiny_bundle, "--max-tokens", TOKENS]
    assert invoke(*arguments, "--max-kl", 5).exit_code == 0
    result = invoke(*arguments, "--max-kl", 0.0001)
    assert result.exit_code == 3
    assert "mean KL divergence" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {worse} is too far from {tiny_bundle} (fp32): mean KL")
    assert last.endswith("allowed 0.0001")


def test_eval_of_nothing_is_one_line(tmp_path, tiny_bundle):
    assert_one_line_error(invoke("eval", tmp_path / "missing"), "missing is not a directory")
    result = invoke("eval", tiny_bundle, "--text", tmp_path / "missing")
    assert_one_line_error(result, "cannot read", "missing")


@pytest.mark.parametrize(
    "options",
    [
        ["--max-kl", "0.1"],
        ["--max-kl", "-1", "--reference", "x"],
        ["--max-tokens", "1"],
        ["--window", "1"],
        ["--seed", "-1"],
    ],
)
def test_eval_tells_wrong_usage_from_failure(options):
    result = invoke("eval", "bundle", *options)
    assert result.exit_code == 2
    assert "Usage: " in result.output
