"""The runtime on aarch64, under emulation, with Debian's Python and the wheels of PyPI."""

import json

import aarch64
import numpy as np
import pytest
from conftest import TINY_CHECKPOINT
from exported import in_ort_format

import doge_onnx
from doge_onnx.runtime.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(aarch64.unavailable() is not None, reason=str(aarch64.unavailable())),
]

PROMPTS = ("It was a dark and stormy night", "Once upon a time")
NEW_TOKENS = 12
# ONNX Runtime and this package have kernels of their own for each.
PROCESSORS = {
    "Cortex-A72, as in a Raspberry Pi 4": ("cortex-a72", "neon"),
    "Cortex-A76, as in a Raspberry Pi 5: dot products of int8": ("cortex-a76", "neon_dotprod"),
    # SVE and SME are slow to emulate, and few boards have them.
    "matrix products of int8, as in later phones": ("max,sve=off,sme=off", "neon_i8mm"),
}
IN_ORT_FORMAT = "int4 in the ORT format"
# Of the largest logit. This package's kernels compute the same on each processor, but for the order
# of sums, by which an input of a product with codes may be rounded to its other neighbour of 16
# bits: that is 0.01 percent between the kernels of one x86 processor, too. ONNX Runtime rounds such
# inputs to 8 bits, in another way on each processor, which changes logits by up to 1.4 percent. So
# candidates that are closer than half of that may swap places, which they seldom are.
TOLERANCE = {"fp32": 1e-5, "int8": 3e-4, "int4": 3e-4, IN_ORT_FORMAT: 0.03}
NEAR_TIE, FEW = 0.007, 2
SCRIPT = """
import json, platform, sys
import numpy
import doge_onnx

assert platform.machine() == "aarch64"
out, bundles, prompts, new_tokens = json.loads(sys.argv[1])
texts, kernels = {}, {}
for name, path in bundles.items():
    model = doge_onnx.load(path, threads=1)
    texts[name] = [
        model.generate(prompt, max_new_tokens=new_tokens, temperature=0).token_ids
        for prompt in prompts
    ]
    logits, _ = model.forward([list(range(1, 25))], logits="all")
    numpy.save(f"{out}/{name}.npy", logits)
    kernels[name] = str(model.kernels)
print(json.dumps([texts, kernels]))
"""


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    made = {"fp32": tiny_bundle}
    for precision in ("int8", "int4"):
        made[precision] = doge_onnx.export(
            TINY_CHECKPOINT, out / precision, precision=precision, rounding="nearest", verify=False
        ).path
    # One of them in ONNX Runtime's own format, too, which is for such processors.
    return made | {IN_ORT_FORMAT: in_ort_format(made["int4"], out / "ort")}


@pytest.fixture(scope="module", autouse=True)
def system():
    aarch64.make()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_text_is_that_of_this_machine(processor, bundles, tmp_path):
    paths = {name: str(path) for name, path in bundles.items()}
    job = json.dumps([str(tmp_path), paths, PROMPTS, NEW_TOKENS])
    cpu, instructions = PROCESSORS[processor]
    texts, kernels = json.loads(aarch64.run(cpu, "-c", SCRIPT, job))
    assert kernels.pop(IN_ORT_FORMAT).startswith("ONNX Runtime's")
    assert set(kernels.values()) == {f"doge_onnx ({instructions})"}
    for name, path in bundles.items():
        model = doge_onnx.load(path)
        ours, _ = model.forward([list(range(1, 25))], logits="all")
        difference = np.abs(np.load(tmp_path / f"{name}.npy") - ours).max()
        assert difference < TOLERANCE[name] * np.abs(ours).max(), name
        for prompt, ids in zip(PROMPTS, texts[name], strict=True):
            ranks, gaps = judge(model, Tokenizer(path / "tokenizer.json").encode(prompt), ids)
            if name != IN_ORT_FORMAT:
                assert not ranks.any(), name
            assert np.count_nonzero(ranks) <= FEW, name
            assert gaps.max() < NEAR_TIE, name


def judge(model, prompt, ids):
    """What this machine thinks of greedy tokens: how many it likes more, and by how much."""
    assert len(ids) == NEW_TOKENS
    logits, _ = model.forward([[*prompt, *ids[:-1]]], logits="all")
    rows = logits[0, -len(ids) :]
    chosen = rows[np.arange(len(ids)), ids][:, np.newaxis]
    gaps = (rows.max(axis=-1, keepdims=True) - chosen) / np.abs(rows).max()
    return (rows > chosen).sum(axis=-1), gaps
