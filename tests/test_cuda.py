"""The provider of onnxruntime-gpu: where it places a step's nodes, and what it copies.

Most of it needs no GPU: the real provider runs on a stand-in for CUDA whose kernels compute
nothing. What the kernels compute is for the tests that are marked, on a machine with a GPU.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import checkpoints
import cuda_stand_in
import numpy as np
import older_checkpoints
import pytest
import torch
from conftest import TINY_CHECKPOINT
from environments import ROOT, environment

import doge_onnx
from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export import half
from doge_onnx.export.half import HALVES
from doge_onnx.export.verify import RELATIVE_TOLERANCES
from doge_onnx.runtime.engine.device import missing_for_cuda
from doge_onnx.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.external

# Arithmetic on lengths: of one number each.
_LENGTHS = {"Cast", "Max", "Mod", "Squeeze", "Sub"}
_RUN = {
    "fp16": {"device": "cuda"},
    "bf16": {"device": "cuda", "precision": "bf16"},
    "int8": {"device": "cuda", "precision": "int8", "rounding": "nearest"},
    "int4": {"device": "cuda", "precision": "int4", "rounding": "nearest"},
    "fp16, int8 state": {"device": "cuda", "kv_cache": "int8"},
}
_PLACE = {
    "fp32 in standard operators": {"target": "portable"},
    "fp32 with a window state": {"target": "portable", "state": "window"},
    "fp16 past the window": {"device": "cuda", "context_length": 96},
}
_VARIANTS = {
    "mixture": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3},
    "biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "gelu",
    },
}


@pytest.fixture(scope="module")
def gpu_python() -> Path:
    """The interpreter of an environment with onnxruntime-gpu."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("onnxruntime-gpu has a wheel for Linux on x86-64 only")
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("the stand-in for CUDA needs gcc and binutils")
    return environment(ROOT / "tests" / "requirements" / "cuda.txt")


@pytest.fixture(scope="module")
def stand_in(gpu_python, tmp_path_factory) -> Path:
    """A directory with libraries that stand in for CUDA."""
    provider = next(gpu_python.parent.parent.rglob("libonnxruntime_providers_cuda.so"))
    directory = tmp_path_factory.mktemp("cuda")
    cuda_stand_in.build(provider, directory)
    return directory


@pytest.fixture(scope="module")
def seen(gpu_python, stand_in, tmp_path_factory, make_bundle):
    """What onnxruntime-gpu does with a bundle of each kind."""
    made = tmp_path_factory.mktemp("checkpoints")
    checkpoint = checkpoints.make(made / "plain", num_hidden_layers=2, keep_window_size=64)
    paths: dict[str, tuple[Path, str]] = {}
    for kind, options in (_RUN | _PLACE).items():
        bundle = make_bundle(checkpoint, verify=False, **options)
        what = "capture" if kind in _RUN else "run" if "device" in options else "place"
        paths[kind] = (bundle.path, what)
    for kind, overrides in _VARIANTS.items():
        varied = checkpoints.make(made / kind, num_hidden_layers=1, **overrides)
        paths[kind] = (make_bundle(varied, verify=False, device="cuda").path, "capture")
    older_checkpoints.make(made / "older", "older", num_hidden_layers=1)
    paths["older"] = (make_bundle(made / "older", verify=False, device="cuda").path, "capture")
    log = stand_in / "copies"
    environ = {"LD_LIBRARY_PATH": str(stand_in), "CUDA_STAND_IN_LOG": str(log)}
    done = subprocess.run(
        [gpu_python, "cuda_worker.py", *(f"{path}={what}" for path, what in paths.values())],
        cwd=Path(__file__).parent,
        env=os.environ | environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {kind: results[str(path)] for kind, (path, _) in paths.items()}


def test_what_is_missing_on_this_very_machine_is_named(gpu_python, stand_in, tmp_path):
    code = "from doge_onnx.runtime.engine.device import missing_for_cuda; print(missing_for_cuda())"

    def missing(libraries: Path) -> str:
        done = run_there(gpu_python, libraries, code)
        assert done.stderr == ""
        return done.stdout

    assert missing(stand_in) == "None\n"
    if ctypes.util.find_library("cuda") is not None:
        pytest.skip("this machine has a driver")
    assert missing(tmp_path).startswith("there is no NVIDIA driver here")
    shutil.copy(stand_in / "libcuda.so.1", tmp_path)
    assert "libcublas.so.13" in missing(tmp_path)


def run_there(gpu_python, stand_in, code, **environ):
    """What a program prints that runs with onnxruntime-gpu on the stand-in."""
    environ |= {"LD_LIBRARY_PATH": str(stand_in), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [gpu_python, "-c", code],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        (
            "cuda",
            "2",
            "DeviceError CUDA does not start here: CUDA failure 2: an error of the stand-in",
        ),
        ("auto", "2", "cpu"),
        ("auto", "0", "cuda"),
    ],
)
def test_a_gpu_that_fails_is_told_or_left(
    device, error, said, gpu_python, stand_in, tmp_path, make_bundle
):
    path = make_bundle(TINY_CHECKPOINT, verify=False, device="cuda").path
    code = (
        "import doge_onnx\n"
        f"try: print(doge_onnx.load({str(path)!r}, {device!r}).device)\n"
        "except doge_onnx.DogeOnnxError as error: print(type(error).__name__, error)"
    )
    done = run_there(gpu_python, stand_in, code, CUDA_STAND_IN_ERROR=error)
    # ONNX Runtime has nothing to say on the standard output.
    assert done.stdout == said + "\n"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        # Nothing is computed, so nothing that is replayed can be right.
        ({}, "the logits of a step of fixed shapes differ by nan"),
        ({"CUDA_STAND_IN_SPOIL": "1"}, "CUDA failure 901: an error of the stand-in"),
    ],
)
def test_without_a_good_capture_steps_run_as_usual(
    spoil, said, gpu_python, stand_in, tmp_path, make_bundle
):
    path = make_bundle(TINY_CHECKPOINT, verify=False, device="cuda").path
    code = (
        "import doge_onnx\n"
        f"model = doge_onnx.load({str(path)!r}, 'cuda')\n"
        "print(model.cuda_graph, len(model.generate([3, 4], max_new_tokens=9).token_ids))\n"
        f"try: doge_onnx.load({str(path)!r}, 'cuda', cuda_graph=True)\n"
        "except doge_onnx.DogeOnnxError as error: print(type(error).__name__, error)"
    )
    done = run_there(gpu_python, stand_in, code, **spoil)
    first, second = done.stdout.splitlines()
    assert first.startswith("False ")
    assert second == (
        f"DeviceError the steps of this bundle cannot be captured in a CUDA graph: {said}; "
        "or run it without"
    )
    assert done.stderr == ""


def test_the_benchmark_says_what_is_missing():
    if missing_for_cuda() is None:
        pytest.skip("this machine has CUDA")
    script = ROOT / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {missing_for_cuda()}\n"


def test_checkpoints_that_are_measured_fit_into_fp16(tmp_path):
    # By its path: the tests have a module of that name, too.
    spec = spec_from_file_location("measured", ROOT / "benchmarks" / "checkpoints.py")
    measured = module_from_spec(spec)
    spec.loader.exec_module(measured)
    directory = measured.random_checkpoint(tmp_path, "20M", vocab_size=97)
    text = torch.tensor([checkpoints.random_ids(64)])
    half.check_activations(checkpoint_reader.read(directory), text)


_KINDS = [*_RUN, *_VARIANTS, "older"]
_GREEDY = ("greedy", "greedy, unequal", "greedy, one ended")


@pytest.fixture(params=["as it is", "captured"])
def way(request) -> str:
    """Whether decode steps are captured."""
    return request.param


@pytest.mark.parametrize("kind", _KINDS)
def test_nothing_of_a_step_leaves_the_gpu_but_arithmetic_on_lengths(seen, kind, way):
    looked = seen[kind][way]
    assert (looked["device"], looked["cuda_graph"]) == ("cuda", way == "captured")
    assert set(looked["on the CPU"]) <= _LENGTHS
    assert sum(looked["on the CPU"].values()) < 10
    assert looked["on CUDA"]["GroupQueryAttention"] > 0


@pytest.mark.parametrize("kind", _PLACE)
def test_bundles_of_other_kinds_run_there_too(seen, kind):
    # `load` has looked at it; here only numbers of axes remain.
    placed = seen[kind]["as it is"]["on the CPU"]
    assert not {"MatMul", "Softmax", "GroupQueryAttention"} & set(placed)


def across(events: dict[str, int]) -> dict[str, int]:
    """What crosses between host and device."""
    return {event: count for event, count in events.items() if event[:4] in ("HtoD", "DtoH")}


@pytest.mark.parametrize("kind", _KINDS)
def test_greedy_decoding_copies_token_ids_and_lengths_only(seen, kind, way):
    # The ids of two tokens come back, and the lengths of two sequences go there, whether these
    # are equal, and whether one has ended: it keeps its place.
    for what in _GREEDY:
        assert across(seen[kind][way][what]) == {"DtoH 16": 1, "HtoD 16": 1}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_captured_step_is_one_launch(seen, kind):
    # Besides, there is the search for the best token.
    for what in (*_GREEDY, "top-k"):
        events = seen[kind]["captured"][what]
        assert (events["replay"], events["kernel"]) == (1, 1)
    assert seen[kind]["as it is"]["greedy"]["kernel"] > 20
    assert "replay" not in seen[kind]["as it is"]["greedy"]
    # What was captured copies nothing from the host, where it would be gone at the next replay.
    recorded = seen[kind]["captured"]["recorded"]
    assert "captured kernel" in recorded
    assert all(event.startswith(("captured kernel", "captured DtoD")) for event in recorded)


@pytest.mark.parametrize("kind", _KINDS)
def test_sampling_copies_what_the_sampler_looks_at(seen, kind, way):
    vocab_size = 97 if kind != "older" else older_checkpoints.SMALL["vocab_size"]
    everything = {f"DtoH {2 * vocab_size * 4}"}
    back = {
        what: {copy for copy in seen[kind][way][what] if copy.startswith("DtoH")}
        for what in ("top-k", "all")
    }
    assert back["all"] == everything
    # The logits of the stand-in are all equal, so that those of the sixth best and beyond may be
    # candidates, too, and all are fetched in the end.
    candidates = 2 * (5 + 16)
    assert back["top-k"] == {f"DtoH {candidates * 8}", f"DtoH {candidates * 4}"} | everything
    # There go the ids and the lengths.
    assert seen[kind][way]["top-k"]["HtoD 16"] == seen[kind][way]["all"]["HtoD 16"] == 2


@pytest.mark.parametrize("kind", _KINDS)
def test_states_grow_and_are_continued_on_a_device(seen, kind, way):
    assert seen[kind][way]["tokens"] > 20
    assert seen[kind][way]["shape"][:2] == [2, 3]


@pytest.fixture(scope="module")
def gpu():
    missing = missing_for_cuda()
    if missing is not None:
        pytest.skip(f"no CUDA here: {missing}")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", HALVES)
def test_a_gpu_computes_what_the_reference_does(gpu, tmp_path, precision):
    out = tmp_path / "bundle"
    report = doge_onnx.export(TINY_CHECKPOINT, out, device="cuda", precision=precision)
    assert report.parity is not None
    assert (report.parity.device, report.parity.passed) == ("cuda", True)


def assert_same_text(here, there):
    """What one model writes is what the other would, but for near-ties."""
    prompt = Tokenizer(TINY_CHECKPOINT / "tokenizer.json").encode("It was a dark and stormy night")
    for writer, reader in ((here, there), (there, here)):
        # As it generates, one token after another, and all at once.
        ids = writer.generate(prompt, max_new_tokens=64).token_ids
        logits, _ = reader.forward([prompt + ids[:-1]], logits="all")
        equal = 0
        for row, token in zip(logits[0, len(prompt) - 1 :], ids, strict=True):
            equal += int(row.argmax()) == token
            gap = float(row.max() - row[token])
            assert gap <= RELATIVE_TOLERANCES["float16"] * float(np.abs(row).max())
        assert equal >= len(ids) - 3


def test_fp16_continues_a_text_as_fp32_does(make_bundle):
    # Here on the CPU, so that the next test is known to be able to pass.
    exact = make_bundle(TINY_CHECKPOINT, verify=False)
    rounded = make_bundle(TINY_CHECKPOINT, verify=False, device="cuda")
    assert_same_text(*(doge_onnx.load(made.path, device="cpu") for made in (exact, rounded)))


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_continues_a_text_as_the_cpu_does(gpu, cuda_graph, make_bundle):
    path = make_bundle(TINY_CHECKPOINT, verify=False, device="cuda").path
    here = doge_onnx.load(path, device="cpu")
    there = doge_onnx.load(path, device="cuda", cuda_graph=cuda_graph)
    assert there.cuda_graph == cuda_graph
    assert_same_text(here, there)
