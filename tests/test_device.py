"""Choosing a device, and keeping a state in its memory. All of it runs on a CPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import fake_bundle
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import TINY_CHECKPOINT
from runners import PassingSession, model_on, on_device
from typer.testing import CliRunner

import doge_onnx
from doge_onnx.bundle import seal
from doge_onnx.cli import app
from doge_onnx.errors import BundleError, DeviceError, InputError
from doge_onnx.runtime.cuda import helper_graphs as graphs
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.runner import (
    CudaCopyingRunner,
    CudaGrowingRunner,
    CudaWindowRunner,
)
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine.runner import TopLogits

FP32 = fake_bundle.manifest()
FP16 = replace(FP32, device="cuda", precision="fp16", activations="float16")
BF16 = replace(FP32, device="cuda", precision="bf16", activations="bfloat16")
INT4 = replace(FP32, device="cuda", precision="int4", activations="float16")
PORTABLE = fake_bundle.manifest(in_place=False)


class Driver:
    """A libcuda.so.1."""

    def __init__(self, error: int = 0, version: int = 13000, gpus: int = 1):
        self.error, self.version, self.gpus = error, version, gpus

    def cuInit(self, flags):  # noqa: N802  # its name
        return self.error

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = self.version

    def cuDeviceGetCount(self, number):  # noqa: N802
        number._obj.value = self.gpus


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these parts of CUDA."""

    def pretend(gpu_package=True, driver: Driver | None = None, missing=()):
        providers = ["CPUExecutionProvider"]
        if gpu_package:
            providers.insert(0, "CUDAExecutionProvider")
        driver = Driver() if driver is None else driver

        def noisy():
            sys.stdout.write("Failed to load libcudnn.so.9")

        def loaded(name):
            if name in missing:
                raise OSError(name)
            return driver

        monkeypatch.setattr(devices.ort, "get_available_providers", lambda: providers)
        monkeypatch.setattr(devices.ort, "preload_dlls", noisy)
        monkeypatch.setattr(devices.platform, "system", lambda: "Linux")
        monkeypatch.setattr(devices.ctypes, "CDLL", loaded)

    return pretend


@pytest.mark.parametrize("manifest", [FP16, BF16, INT4, PORTABLE])
def test_auto_takes_cuda_where_it_is(machine, manifest, capsys):
    machine()
    assert devices.choose_device("auto", manifest) == "cuda"
    assert devices.choose_device("cuda", manifest) == "cuda"
    # What ONNX Runtime prints while it looks for libraries is for nobody.
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("manifest", [FP32, FP16, INT4, PORTABLE])
def test_auto_takes_the_cpu_where_cuda_is_not(machine, manifest):
    machine(gpu_package=False)
    assert devices.choose_device("auto", manifest) == "cpu"
    machine(driver=Driver(gpus=0))
    assert devices.choose_device("auto", manifest) == "cpu"


def test_a_bundle_for_the_cpu_stays_there_and_the_cpu_can_be_insisted_on(machine):
    machine()
    assert devices.choose_device("auto", FP32) == "cpu"
    assert devices.choose_device("cpu", FP16) == "cpu"
    with pytest.raises(DeviceError, match=r"fp32 .*; export it again for the device cuda"):
        devices.choose_device("cuda", FP32)


def test_bf16_is_for_cuda_only(machine):
    machine(gpu_package=False)
    with pytest.raises(DeviceError, match="no kernels on the CPU: it needs CUDA"):
        devices.choose_device("cpu", BF16)
    # Which says of both devices why it is neither.
    with pytest.raises(DeviceError, match=r"no kernels on the CPU.*built without CUDA"):
        devices.choose_device("auto", BF16)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"gpu_package": False},
            r"built without CUDA; .*pip install 'doge-onnx\[cuda\]' && pip uninstall ",
        ),
        (
            {"missing": ["libcuda.so.1"]},
            r"no NVIDIA driver here \(libcuda\.so\.1 cannot be loaded\); install .*580 or newer",
        ),
        ({"driver": Driver(error=100)}, r"no GPU that it can use \(cuInit: error 100\)"),
        ({"driver": Driver(version=12080)}, r"driver is for CUDA 12\.8, which is too old; install"),
        ({"driver": Driver(gpus=0)}, "shows no GPU; see whether CUDA_VISIBLE_DEVICES"),
        (
            {"missing": ["libcublas.so.13", "libcurand.so.10"]},
            r"incomplete here \(libcublas\.so\.13, libcurand\.so\.10 cannot .*doge-onnx\[cuda\]",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(machine, parts, message):
    machine(**parts)
    with pytest.raises(DeviceError, match=message) as caught:
        devices.choose_device("cuda", FP16)
    assert "\n" not in str(caught.value)
    assert devices.choose_device("auto", FP16) == "cpu"


@pytest.mark.parametrize(
    ("manifest", "parts", "reason"),
    [
        (FP16, {"gpu_package": False}, "built without CUDA; install"),
        (FP16, {"driver": Driver(gpus=0)}, "the NVIDIA driver shows no GPU"),
        (PORTABLE, {"driver": Driver(gpus=0)}, "the NVIDIA driver shows no GPU"),
        (FP32, {}, "this bundle computes in fp32 with operators for the CPU"),
        # Nobody expects anything else.
        (FP32, {"gpu_package": False}, None),
        (PORTABLE, {"gpu_package": False}, None),
    ],
)
def test_why_auto_takes_the_cpu_is_told(machine, manifest, parts, reason):
    machine(**parts)
    told = devices.reason_for_cpu(manifest)
    assert told is None if reason is None else reason in told


def test_the_command_line_says_why_it_takes_the_cpu(tmp_path, make_bundle, tiny_bundle):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    half = make_bundle(TINY_CHECKPOINT, device="cuda", verify=False).path
    result = CliRunner().invoke(app, ["generate", str(half), "It was", "--max-new-tokens=2"])
    (line,) = result.stderr.splitlines()
    assert line.startswith("(this runs on the CPU: the installed onnxruntime")
    for more in ([str(half), "--device=cpu"], [str(tiny_bundle)]):
        result = CliRunner().invoke(app, ["generate", "--max-new-tokens=2", *more, "It was"])
        assert (result.exit_code, result.stderr) == (0, "")


def test_a_device_that_nobody_knows_is_wrong_usage():
    with pytest.raises(InputError, match="'tpu' is not known; choose from: auto, cpu, cuda"):
        devices.choose_device("tpu", FP16)


def test_onnxruntime_without_cuda_is_told_from_one_with_it(tmp_path):
    # The real one, which the tests run with.
    path = fake_bundle.write(tmp_path / "b", in_place=False)
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DeviceError, match="built without CUDA"):
        doge_onnx.load(path, device="cuda")
    assert doge_onnx.load(path).device == "cpu"


class Session:
    """One that was told to record where its nodes are."""

    def __init__(self, providers, nodes):
        self._providers, self._nodes = providers, nodes

    def get_providers(self):
        return self._providers

    def get_provider_graph_assignment_info(self):
        class Part:
            def __init__(self, provider, operator):
                self.ep_name, self.op_type = provider, operator

            def get_nodes(self):
                return [self]

        return [Part(*node) for node in self._nodes]


def test_a_step_that_leaves_the_gpu_is_refused():
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    good = [("CUDAExecutionProvider", "MatMul"), ("CPUExecutionProvider", "Squeeze")]
    devices.check_placement(Session(both, good))
    bad = [*good, ("CPUExecutionProvider", "Softplus"), ("CPUExecutionProvider", "MatMul")]
    with pytest.raises(DeviceError, match="no CUDA kernel for MatMul, Softplus as used by this"):
        devices.check_placement(Session(both, bad))
    # ONNX Runtime goes on with the CPU when CUDA does not start.
    with pytest.raises(DeviceError, match="could not start CUDA"):
        devices.check_placement(Session(["CPUExecutionProvider"], []))


def model_on_device(path, *args, **options):
    """A model whose state is in the memory of a device, which is the CPU."""
    return model_on(path, on_device(path, *args, **options))


@pytest.fixture(
    params=[
        *("in place", "in place without logits_to_keep", "int8", "copying"),
        *("fp16", "fp16, captured"),
    ]
)
def pair(request, tmp_path, make_bundle, main_checkpoint):
    """The same bundle as usual, and as on a device."""
    if request.param.startswith("fp16"):
        # Of a real export: its graph can be told where in the mask its tokens are.
        path = make_bundle(main_checkpoint, device="cuda", verify=False).path
        usual = doge_onnx.load(path, device="cpu", prefill_chunk=4)
        return usual, model_on_device(path, capture="captured" in request.param)
    changes = {
        "in place": {},
        "in place without logits_to_keep": {"keep": False},
        "int8": {"dtype": "int8"},
        "copying": {"in_place": False},
    }[request.param]
    path = fake_bundle.write(tmp_path / "b", **changes)
    runner = CudaCopyingRunner if request.param == "copying" else CudaGrowingRunner
    return doge_onnx.load(path, device="cpu", prefill_chunk=4), model_on_device(path, runner)


PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [3, 3, 5]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": True},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.5, "top_k": 3, "seed": 1},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01, "seed": 2},
        {"temperature": 1.5, "top_k": 1000, "seed": 2},
    ],
)
def test_texts_are_the_same_wherever_the_state_is(pair, options):
    here, there = pair
    for prompts in (PROMPTS[:1], PROMPTS):
        ours = there.generate_batch(prompts, max_new_tokens=9, **options)
        usual = here.generate_batch(prompts, max_new_tokens=9, **options)
        for one, other in zip(ours, usual, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs


def test_states_keep_their_value_wherever_they_are(pair):
    here, there = pair
    results = []
    for model in (here, there):
        logits, state = model.forward([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]], logits="all")
        first, _ = model.forward([[6], [7]], state)
        many, longer = model.forward([[6, 7, 8], [3, 4, 4]], state, logits="all")
        again, _ = model.forward([[6], [7]], state)
        np.testing.assert_array_equal(first, again)
        padded, _ = model.forward([[6], [7]], longer, attention_mask=[[1], [0]])
        results.append((logits, first, many, padded))
    for ours, usual in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, usual)


def test_a_buffer_on_a_device_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("doge_onnx.runtime.engine.state.FIRST_CAPACITY", 2)
    path = fake_bundle.write(tmp_path / "b")
    model = model_on_device(path)
    logits, state = model.forward([[3, 4]])
    for token in [5, 6, 7, 8, 9]:
        logits, state = model.forward([[token]], state)
    np.testing.assert_allclose(
        logits[0], fake_bundle.reference([3, 4, 5, 6, 7, 8, 9])[-1:], atol=1e-3
    )


class Equalising(PassingSession):
    """A session that changes the logits that were computed: most become equal."""

    def run_with_iobinding(self, binding, options):
        self.session.run_with_iobinding(binding, options)
        (logits,) = (value for value in binding.get_outputs() if len(value.shape()) == 3)
        if logits.shape()[1] == 1:
            row = np.linspace(-1, 1, fake_bundle.VOCAB, dtype=np.float32)
            # In the second row, more are equal to the third best than come along.
            tied = row.copy()
            tied[-9:-2] = tied[-3]
            logits.update_inplace(np.stack([row, tied])[:, np.newaxis])


def test_candidates_are_as_many_as_needed_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("doge_onnx.runtime.cuda.runner.EXTRA_CANDIDATES", 2)
    path = fake_bundle.write(tmp_path / "b")
    runner = on_device(path, session=Equalising(path))
    _, state = runner.forward([np.array([3]), np.array([4])], None, last_only=False)
    first, second = runner.decode(state).step([5, 6], 3)
    assert isinstance(first, TopLogits)
    assert first.ids.tolist() == list(range(fake_bundle.VOCAB - 5, fake_bundle.VOCAB))
    row = np.linspace(-1, 1, fake_bundle.VOCAB, dtype=np.float32)
    np.testing.assert_array_equal(first.logits, row[-5:])
    row[-9:-2] = row[-3]
    np.testing.assert_array_equal(second, row)


def test_greedy_ids_do_not_come_back_from_the_host(tmp_path):
    runner = on_device(fake_bundle.write(tmp_path / "b"))
    _, state = runner.forward([np.array([3]), np.array([4])], None, last_only=True)
    session = runner.decode(state)
    chosen = [int(row.ids[0]) for row in session.step([5, 6], top=1)]
    # The host says something else now, which nobody asks it for.
    scores = session.step([7, 7])
    for row, (prompt, token) in enumerate(zip(([3, 5], [4, 6]), chosen, strict=True)):
        truth = fake_bundle.reference([*prompt, token])[-1]
        np.testing.assert_allclose(scores[row], truth, atol=1e-3)


def test_window_states_on_a_device(tmp_path, make_bundle, main_checkpoint):
    made = make_bundle(main_checkpoint, state="window", verify=False)
    here = doge_onnx.load(made.path, device="cpu")
    there = model_on_device(made.path, CudaWindowRunner, 16)
    ids = np.random.default_rng(0).integers(0, 97, (2, 90))
    for model in (here, there):
        model.first, state = model.forward(ids[:, :70], logits="all")
        model.second, _ = model.forward(ids[:, 70:], state, logits="all")
        model.text = model.generate_batch([[3, 4, 5], [6]], max_new_tokens=80)
    np.testing.assert_allclose(there.first, here.first, atol=1e-4)
    np.testing.assert_allclose(there.second, here.second, atol=1e-4)
    assert [t.token_ids for t in there.text] == [t.token_ids for t in here.text]


@pytest.mark.parametrize("graph", [graphs.top_k(), graphs.extension("bfloat16")])
def test_small_graphs_are_valid_onnx(graph):
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)


# Of bfloat16 the CPU has no kernel for this; test_cuda.py sees it run.
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_state_tensors_of_every_type_are_extended(dtype):
    memory = DeviceMemory("cpu")
    none = memory.empty((2, 1, 0, 8), dtype)
    zeros = memory.extended(none, np.zeros(8, np.float32), 3)
    row = np.zeros(8, np.float32)
    row[2] = -3.0
    longer = memory.extended(zeros, row, 2)
    assert longer.shape == (2, 1, 5, 8)
    assert longer.value.element_type() == graphs.ELEMENT_TYPES[dtype]
    values = memory.read(longer).astype(np.float32)
    np.testing.assert_array_equal(values[:, :, :3], 0)
    np.testing.assert_array_equal(values[:, :, 3:], np.broadcast_to(row, (2, 1, 2, 8)))
    # A view of the second sequence starts where that does.
    part = longer[1:2]
    assert part.shape == (1, 1, 5, 8)
    assert part.address == longer.address + 5 * 8 * {"float32": 4, "int8": 1}.get(dtype, 2)


def test_a_type_of_state_that_nobody_knows_is_refused_before_any_device(tmp_path):
    path = fake_bundle.write(tmp_path / "b", in_place=False)
    seal(path, fake_bundle.manifest(in_place=False, dtype="float8"))
    with pytest.raises(BundleError, match="float8"):
        doge_onnx.load(path, device="cpu")
