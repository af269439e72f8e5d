"""`bench`: what is measured in which order, what is made of it, and how it looks.

No test looks at how long something took: clocks are scripted, but for one real run whose
figures only have to be possible.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import replace

import fake_bundle
import numpy as np
import pytest
from fake_bundle import CONTEXT, HEADS, LAYERS, ROW, VOCAB
from typer.testing import CliRunner

import doge_onnx
from doge_onnx import cli, cli_options
from doge_onnx.bundle import GRAPH_NAME, Bundle, read_manifest
from doge_onnx.errors import BundleError, InputError
from doge_onnx.manifest import WeightsRead
from doge_onnx.measure import bandwidth, bench, memory, start_up
from doge_onnx.measure.bench import Samples
from doge_onnx.measure.workload import Cell, Spread, generate_plain, random_prompts
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.engine.external_data import external_files
from doge_onnx.runtime.generation.config import option_names
from doge_onnx.runtime.generation.output import Timings

ROW_BYTES = 2 * LAYERS * HEADS * ROW * 4


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.fixture
def fake(tmp_path):
    return fake_bundle.write(tmp_path / "b")


@pytest.fixture(autouse=True)
def small_array(monkeypatch):
    monkeypatch.setattr(bandwidth, "MAX_ARRAY_BYTES", 2**20)


# --- the bytes of a step ------------------------------------------------------------------


def test_a_step_reads_weights_and_every_row_of_the_state():
    manifest = fake_bundle.manifest(weights_read=WeightsRead(whole=1000, per_token=8))
    assert bench.step_bytes(manifest, Cell(20, 1), 1) == 1008 + 20 * ROW_BYTES
    # 20, 21 and 22 rows.
    assert bench.step_bytes(manifest, Cell(20, 1), 3) == 1008 + 21 * ROW_BYTES
    assert bench.step_bytes(manifest, Cell(20, 4), 3) == 1032 + 4 * 21 * ROW_BYTES


def test_an_int8_state_is_a_quarter():
    manifest = fake_bundle.manifest(dtype="int8", weights_read=WeightsRead(0, 0))
    assert bench.step_bytes(manifest, Cell(20, 1), 1) == 20 * ROW_BYTES // 4


def test_a_window_state_reads_no_more_than_its_window():
    manifest = fake_bundle.manifest(
        kind="window", keep_window_size=21, weights_read=WeightsRead(0, 0)
    )
    # 20, 21, 21 and 21 rows.
    assert bench.step_bytes(manifest, Cell(20, 1), 4) == round(20.75 * ROW_BYTES)


# --- what is run, and in which order ------------------------------------------------------


def test_contexts_that_do_not_fit_are_left_out_with_the_reason():
    # 9 tokens are generated: 8 steps, and the one before them.
    fits = CONTEXT - 9
    cells, left_out = bench.choose_cells(
        fake_bundle.manifest(), [CONTEXT, fits, 16, fits + 1, 16], [8, 1], 8
    )
    assert cells == [(16, 1), (16, 8), (fits, 1), (fits, 8)]
    assert [entry.context for entry in left_out] == [fits + 1, CONTEXT]
    assert f"at most {fits} " in left_out[0].reason
    assert f"context length of {CONTEXT}" in left_out[0].reason


def test_a_window_has_room_for_every_context():
    manifest = fake_bundle.manifest(kind="window")
    cells, left_out = bench.choose_cells(manifest, [10 * CONTEXT], [1], 8)
    assert (cells, left_out) == ([(10 * CONTEXT, 1)], [])


def test_the_longest_context_that_fits_runs_in_full(fake):
    tokens = 3
    (cell,), _ = bench.choose_cells(read_manifest(fake), [CONTEXT - tokens - 1], [1], tokens)
    model = doge_onnx.load(fake)
    prompts = random_prompts(cell, VOCAB)
    assert len(generate_plain(model, prompts, tokens + 1)[0].token_ids) == tokens + 1
    # One more does not.
    longer = random_prompts(Cell(cell.context + 1, 1), VOCAB)
    assert len(generate_plain(model, longer, tokens + 1)[0].token_ids) == tokens


class Script:
    """A model that takes 1, 2, 3 ... seconds for a prefill, and ten times that for decode."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, count):
        self.calls.append((len(prompts[0]), len(prompts), count))
        seconds = float(len(self.calls))
        return Timings(len(prompts[0]), seconds, count, 10 * seconds)


def test_repetitions_alternate_and_warm_up_does_not_count():
    cells = [Cell(5, 1), Cell(5, 2), Cell(9, 1), Cell(9, 2)]
    script, begun = Script(), []
    samples = bench.measure_cells(script, cells, VOCAB, 4, 2, lambda *where: begun.append(where))
    # The shortest prompts of each batch warm it up, in either order.
    assert sorted(script.calls[:2]) == [(5, 1, 5), (5, 2, 5)]
    assert script.calls[2:] == 2 * [(*cell, 5) for cell in cells]
    assert begun == [(repetition, cell) for repetition in (0, 1) for cell in cells]
    # The calls are 1 to 10, and the first two are not counted.
    assert [samples[cell].prefill for cell in cells] == [[3, 7], [4, 8], [5, 9], [6, 10]]
    assert samples[cells[0]].step == [30 / 4, 70 / 4]


def test_prompts_are_random_but_always_the_same():
    prompts = random_prompts(Cell(40, 3), VOCAB)
    assert np.shape(prompts) == (3, 40)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert 0 <= np.min(prompts) < VOCAB // 4
    assert VOCAB * 3 // 4 < np.max(prompts) < VOCAB
    assert random_prompts(Cell(40, 3), VOCAB) == prompts
    assert random_prompts(Cell(40, 2), VOCAB)[0] != prompts[0]


def test_neither_an_end_of_text_nor_recommended_options_change_a_run(tmp_path):
    plain = fake_bundle.write(tmp_path / "plain", generation={"eos_token_id": []})
    expected = doge_onnx.load(plain).generate([3, 4], max_new_tokens=9, temperature=0).token_ids
    recommended = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.5,
        "top_h": 0.5,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
        "repetition_penalty": 3.0,
        "encoder_repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "encoder_no_repeat_ngram_size": 1,
        "bad_words_ids": [expected[2:3]],
        "suppress_tokens": expected[1:2],
        "begin_suppress_tokens": expected[:1],
        "sequence_bias": [[expected[4:5], -50.0]],
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 8,
        "exponential_decay_length_penalty": [0, 9.0],
        "remove_invalid_values": True,
        "max_length": 5,
        "max_new_tokens": 3,
        "min_length": 5,
        "min_new_tokens": 9,
        "max_time": 1e-9,
        "stop_strings": ["t", " ", "e"],
        "eos_token_id": list(range(VOCAB)),
    }
    assert set(option_names("recommended")) - {"stop"} <= recommended.keys()
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", generation=recommended))
    assert generate_plain(model, [[3, 4]], 9)[0].token_ids == expected
    assert len(expected) == 9


# --- figures ------------------------------------------------------------------------------


def test_a_spread_is_median_and_extremes():
    assert Spread.of([5, 1, 2]) == Spread(median=2, min=1, max=5)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1, 4)


def test_the_figures_of_a_cell():
    samples = Samples(prefill=[2.0, 1.0, 4.0], step=[0.5, 0.25, 0.1])
    found = bench.summarise_cell(Cell(100, 4), samples, read=3000, bandwidth=48_000.0)
    assert found.first_token_seconds == Spread(2, 1, 4)
    assert found.prefill_tokens_per_second == Spread(200, 100, 400)
    assert found.step_seconds == Spread(0.25, 0.1, 0.5)
    assert found.decode_tokens_per_second == Spread(16, 8, 40)
    assert (found.bytes_per_step, found.bytes_per_token) == (3000, 750)
    assert found.mbu == pytest.approx(3000 / 0.25 / 48_000)


def start(number, peak):
    return {
        "import_seconds": number,
        "load_seconds": 10 * number,
        "first_token_seconds": 100 * number,
        "peak_memory_bytes": peak,
    }


def test_the_figures_of_fresh_processes():
    found = start_up.summarise_start([start(1, 500), start(3, 700), start(2, 600)], 16, 400)
    assert found.import_seconds == Spread(2, 1, 3)
    assert found.load_seconds == Spread(20, 10, 30)
    assert found.first_token_seconds == Spread(200, 100, 300)
    assert found.peak_memory_bytes == Spread(600, 500, 700)
    assert (found.peak_to_file, found.context) == (1.5, 16)


def test_memory_that_the_system_does_not_tell_is_none():
    found = start_up.summarise_start([start(1, None), start(2, None)], 16, 400)
    assert (found.peak_memory_bytes, found.peak_to_file) == (None, None)


def test_peak_memory_remembers_what_is_free_again():
    before = memory.peak_memory()
    assert before is not None
    # More than the process has ever had, whatever other tests left behind.
    array = np.ones(before + 2**20, np.uint8)
    del array
    assert memory.peak_memory() > before


def test_the_array_is_small_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(bandwidth, "MAX_ARRAY_BYTES", 2**30)
    for available, expected in ((2**40, 2**30), (2**30, 2**28), (10, 2**24), (None, 2**30)):
        monkeypatch.setattr(bandwidth, "available_memory", lambda value=available: value)
        assert bandwidth.array_bytes() == expected


def test_bandwidth_is_the_best_of_several_reads(monkeypatch):
    # Reads of 4, 2 and 5 seconds.
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bandwidth, "READS", 3)
    monkeypatch.setattr(bandwidth, "array_bytes", lambda: 8000)
    assert bandwidth.read_bandwidth(3) == 4000


# --- the whole ----------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Nothing is really started; the bandwidth grows with each repetition."""
    bandwidths = iter([1e9, 3e9, 2e9])
    seen = {}

    def measure_start(path, threads, context, tokens, device, cuda_graph, native):
        seen["start"] = (threads, context, tokens)
        return start(1.0, 10**9)

    def read_bandwidth(threads):
        seen["threads"] = threads
        return next(bandwidths)

    monkeypatch.setattr(bench, "measure_start", measure_start)
    monkeypatch.setattr(bench, "read_bandwidth", read_bandwidth)
    return seen


def test_a_report_holds_every_cell_and_the_best_bandwidth(fake, scripted):
    steps = []
    report = doge_onnx.bench(
        fake, contexts=[4, 16, 999], batches=[1, 3], tokens=2, threads=1, progress=steps.append
    )
    assert [(cell.context, cell.batch) for cell in report.cells] == [
        (4, 1),
        (4, 3),
        (16, 1),
        (16, 3),
    ]
    assert [entry.context for entry in report.left_out] == [999]
    assert report.read_bytes_per_second == 3e9
    assert (report.threads, scripted["threads"]) == (1, 1)
    # 512 do not fit: the prompt, two steps, and the token that the last one chooses.
    assert scripted["start"] == (1, CONTEXT - 3, 2)
    for cell in report.cells:
        weights = fake_bundle.WEIGHTS_READ.step_bytes(cell.batch)
        expected = weights + cell.batch * ROW_BYTES * (cell.context + 0.5)
        assert cell.bytes_per_step == expected
        assert cell.mbu == pytest.approx(expected / cell.step_seconds.median / 3e9)
    assert report.file_bytes == (fake / GRAPH_NAME).stat().st_size
    assert steps[0] == "loading and warming up"
    assert "repetition 2 of 3: context 16, batch 3" in steps


def test_without_threads_the_bandwidth_has_those_of_a_model(fake, scripted):
    report = doge_onnx.bench(fake, contexts=[4], batches=[1], tokens=1, repetitions=1)
    assert report.threads == scripted["threads"] == bandwidth.default_threads()
    assert 1 <= report.threads <= os.cpu_count()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contexts": [0]}, "contexts must be positive"),
        ({"contexts": []}, "contexts must be a list"),
        ({"contexts": "16"}, "contexts must be a list"),
        ({"contexts": 16}, "contexts must be a list"),
        ({"contexts": [1.5]}, "contexts must be positive and whole"),
        ({"batches": [1, -1]}, "batches must be positive"),
        ({"batches": [True]}, "batches must be positive and whole, not True"),
        ({"tokens": 0}, "tokens must be positive"),
        ({"repetitions": 0}, "repetitions must be positive"),
        ({"threads": 0}, "threads must be a positive"),
        ({"contexts": [CONTEXT]}, f"no context fits into the {CONTEXT} tokens"),
        ({"tokens": CONTEXT}, "no context fits"),
    ],
)
def test_impossible_measurements_are_refused(options, words, fake, scripted):
    with pytest.raises(InputError, match=words):
        doge_onnx.bench(fake, **options)


def test_a_broken_bundle_is_refused_before_anything_is_measured(fake, scripted):
    (fake / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"config\.json"):
        doge_onnx.bench(fake)
    assert scripted == {}


def test_a_process_that_fails_is_one_line(tmp_path):
    with pytest.raises(BundleError) as caught:
        start_up.measure_start(tmp_path, None, 16, 2)
    assert "ended with exit code 1: " in str(caught.value)
    assert "is not a bundle" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_run_gives_possible_figures(tiny_bundle):
    options = ["--contexts", "8,600,99999", "--batches", "1,2", "--tokens", 2, "--repetitions", 2]
    result = invoke(tiny_bundle, *options, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    manifest = Bundle.open(tiny_bundle).manifest
    names = {GRAPH_NAME} | external_files(tiny_bundle / GRAPH_NAME)
    size = sum((tiny_bundle / name).stat().st_size for name in names)
    assert {name: report[name] for name in ("bundle", "precision", "threads", "file_bytes")} == {
        "bundle": str(tiny_bundle),
        "precision": "fp32",
        "threads": 1,
        "file_bytes": size,
    }
    assert [(cell["context"], cell["batch"]) for cell in report["cells"]] == [
        (8, 1),
        (8, 2),
        (600, 1),
        (600, 2),
    ]
    assert [entry["context"] for entry in report["left_out"]] == [99999]
    begun = report["start"]
    assert begun["context"] == 512
    spreads = [begun[name] for name in ("import_seconds", "load_seconds", "first_token_seconds")]
    spreads.append(begun["peak_memory_bytes"])
    for cell in report["cells"]:
        spreads += [value for value in cell.values() if isinstance(value, dict)]
        # The weights once, and at least the rows of the prompts.
        row = 8 * manifest.state.num_layers * manifest.state.num_heads * manifest.state.row_size
        least = 4 * manifest.parameters + cell["batch"] * cell["context"] * row
        assert least < cell["bytes_per_step"] < 1.1 * least
        assert cell["mbu"] > 0
    assert len(spreads) == 4 + 4 * 4
    for spread in spreads:
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["median"] == statistics.mean([spread["min"], spread["max"]])
    load, first = begun["load_seconds"], begun["first_token_seconds"]
    assert first["min"] > load["min"] + begun["import_seconds"]["min"]
    assert size < begun["peak_memory_bytes"]["min"] < 2**30
    assert begun["peak_to_file"] == begun["peak_memory_bytes"]["median"] / size
    assert report["read_bytes_per_second"] > 1e6


# --- the command --------------------------------------------------------------------------


@pytest.fixture
def canned(fake, scripted, monkeypatch):
    """The command with a report whose figures are as wide as they get."""
    real = doge_onnx.bench(fake, contexts=[4, 16, 999], tokens=1, repetitions=1)
    rate = Spread(12345.6, 10000.4, 23456.7)
    cells = [
        replace(
            cell,
            first_token_seconds=Spread(98.7654321, 1, 100),
            prefill_tokens_per_second=rate,
            decode_tokens_per_second=rate,
            bytes_per_token=1.2345e9,
            mbu=0.875 + number,
        )
        for number, cell in enumerate(real.cells)
    ]
    report = replace(real, cells=tuple(cells))
    given = {}
    monkeypatch.setattr(
        doge_onnx, "bench", lambda bundle, **options: given.update(options) or report
    )
    return given, report


def test_the_table_fits_a_pipe_and_cuts_nothing(canned, fake):
    result = invoke(fake)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in result.stdout
    rows = [line.split() for line in lines]
    speeds = ["98,765", "12,346", "12,346", "10,000", "-", "23,457", "1,234"]
    assert rows[-4:] == [
        ["4", "1", *speeds, "88%"],
        ["4", "8", *speeds, "188%"],
        ["16", "1", *speeds, "288%"],
        ["16", "8", *speeds, "388%"],
    ]
    assert ["read", "bandwidth", "1.0", "GB/s"] in rows
    assert any("1000.0 MB" in line and "times the files" in line for line in lines)
    notes = result.stderr.splitlines()
    assert notes[0] == f"measuring {fake}"
    assert any(line.startswith("left out: context 999: ") for line in notes)
    assert notes[-1].startswith("MBU above 100%")


def test_json_is_all_that_is_on_stdout(canned, fake):
    _, report = canned
    result = invoke(fake, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(report.as_dict()))


def test_options_reach_the_library(canned, fake):
    given, _ = canned
    sizes = ["--contexts", "16,512", "--batches", "8"]
    counts = ["--tokens=5", "--repetitions=7", "--threads=2", "--device=cpu", "--cuda-graph"]
    counts += ["--no-native"]
    assert invoke(fake, *sizes, *counts, "--revision=v1").exit_code == 0
    del given["progress"]
    assert given == {
        "contexts": (16, 512),
        "batches": (8,),
        "tokens": 5,
        "repetitions": 7,
        "threads": 2,
        "device": "cpu",
        "cuda_graph": True,
        "native": False,
        "revision": "v1",
    }
    assert invoke(fake).exit_code == 0
    assert {given[name] for name in ("contexts", "batches", "tokens", "repetitions")} == {None}


def test_help_names_the_defaults():
    for option, default in (
        (cli_options.Contexts, ",".join(map(str, bench.DEFAULT_CONTEXTS))),
        (cli_options.Batches, ",".join(map(str, bench.DEFAULT_BATCHES))),
        (cli_options.DecodeSteps, str(bench.DEFAULT_TOKENS)),
        (cli_options.Repetitions, str(bench.DEFAULT_REPETITIONS)),
    ):
        assert option.__metadata__[0].help.endswith(f"Default: {default}.")


@pytest.mark.parametrize(
    "options",
    [
        ["--contexts", "0"],
        ["--contexts", "16,-1"],
        ["--contexts", ""],
        ["--batches", "1,"],
        ["--batches", "many"],
        ["--tokens", "0"],
        ["--repetitions", "0"],
        ["--threads", "0"],
    ],
)
def test_wrong_usage_is_told_from_failure(options, fake):
    result = invoke(fake, *options)
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failure_is_one_line_and_no_result(options, tmp_path):
    result = invoke(tmp_path, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path} is not a bundle")


def test_bandwidth_of_a_device_is_that_of_its_copies_alone(monkeypatch):
    monkeypatch.setattr(bandwidth, "MAX_ARRAY_BYTES", 2**16)
    events = []
    empty = DeviceMemory.empty

    def watched(memory, *what):
        events.append("memory")
        return empty(memory, *what)

    def clock():
        events.append("clock")
        return events.count("clock") * 2.0

    monkeypatch.setattr(DeviceMemory, "empty", watched)
    monkeypatch.setattr(bandwidth.time, "perf_counter", clock)
    # Read once and written once, in the two seconds between any two looks at the clock.
    assert bandwidth.copy_bandwidth(DeviceMemory("cpu")) == 2**16
    assert events == ["memory"] * 2 + ["clock"] * 2 * bandwidth.READS
