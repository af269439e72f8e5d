"""transformers.js runs bundles of the layout "hub": in Node, and in a Chromium by way of the page.

The texts are those of the Python runtime. Another version of ONNX Runtime rounds otherwise, and
its build for browsers even more so: where two tokens are all but equally likely, the texts may
part. So the prompt is one where they never are, which is checked first.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import chromium
import javascript
import numpy as np
import pytest
from conftest import TINY_CHECKPOINT
from tokenizers import Tokenizer

import doge_onnx
from doge_onnx.bundle import Bundle, read_manifest, seal
from doge_onnx.export import exporter

pytestmark = pytest.mark.external

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DRIVER = ROOT / "tests" / "javascript"
PROMPT = "The little girl said"
TOKENS = 24
# Logits; several times what the builds of ONNX Runtime were seen to differ by.
CLEAR = 0.1
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# WebGPU without a GPU.
SOFTWARE_WEBGPU = [
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
]


@pytest.fixture(scope="module")
def examples():
    """The examples, with their packages."""
    if (reason := javascript.lacking()) is not None:
        pytest.skip(reason)
    javascript.packages(EXAMPLES)
    return EXAMPLES


@pytest.fixture(scope="module")
def hub(tiny_hub_bundle):
    return tiny_hub_bundle


@pytest.fixture(scope="module")
def greedy(hub):
    """The Python runtime's greedy text for a prompt, by precision."""

    def get(precision, prompt=PROMPT, tokens=TOKENS):
        model = doge_onnx.load(hub(precision))
        completion = model.generate(prompt, max_new_tokens=tokens, temperature=0)
        ids = Tokenizer.from_file(str(hub(precision) / "tokenizer.json")).encode(prompt).ids
        logits, _ = model.forward([ids + completion.token_ids], logits="all")
        second, first = np.sort(logits[0, len(ids) - 1 : -1], axis=-1)[:, -2:].T
        assert (first - second).min() > CLEAR, f"another prompt than {prompt!r} is needed"
        return completion.text

    return get


def chat(examples, *arguments, stdin=""):
    """What the example for Node does; its files may be anywhere, so it runs elsewhere."""
    return subprocess.run(
        ["node", examples / "node" / "chat.js", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        input=stdin,
        cwd="/",
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def browse(examples):
    """Visits the page for a bundle in a headless browser; see tests/javascript/browse.js."""
    browser = chromium.find()
    if browser is None:
        pytest.skip(chromium.LACKING)
    javascript.packages(DRIVER)

    def visit(bundle, query="", **scenario):
        command = ["node", examples / "browser" / "server.js", "--port", "0", bundle]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                url = server.stdout.readline().strip()
                scenario = json.dumps({"url": url + query, "prompts": [PROMPT], **scenario})
                done = subprocess.run(
                    ["node", DRIVER / "browse.js", browser, scenario],
                    capture_output=True,
                    text=True,
                    encoding="utf-8",
                    timeout=300,
                    check=False,
                )
            finally:
                server.terminate()
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["failures"] == []
        assert {address for address in seen["requests"] if not address.startswith(url)} <= {
            # What workers with threads are made of.
            address
            for address in seen["requests"]
            if address.startswith("blob:")
        }
        return seen

    return visit


@pytest.mark.parametrize("precision", DTYPES)
def test_node_writes_the_text_that_python_writes(precision, examples, hub, greedy):
    result = chat(examples, "--max-new-tokens", TOKENS, hub(precision), PROMPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == greedy(precision) + "\n"
    assert re.fullmatch(r"24 tokens, \d+\.\d tokens/s\n", result.stderr)


def test_node_gives_no_speed_where_there_is_none(examples, hub):
    result = chat(examples, "--max-new-tokens", 1, hub("fp32"), PROMPT)
    assert (result.returncode, result.stderr) == (0, "1 token\n")


def test_node_asks_for_one_text_after_another(examples, hub, greedy):
    result = chat(examples, "--max-new-tokens", TOKENS, hub("fp32"), stdin=f"{PROMPT}\n\n{PROMPT}")
    assert result.returncode == 0, result.stderr
    # Without a template it is no conversation, and each text is continued on its own.
    assert result.stdout == 2 * (greedy("fp32") + "\n")
    assert result.stderr.count("> ") == 4


def test_a_repository_with_several_precisions(examples, hub, greedy, tmp_path):
    # As if one bundle after another were uploaded to the same place.
    repository = tmp_path / "repository"
    for precision in ("fp32", "fp16", "int4", "int8"):
        shutil.copytree(hub(precision), repository, dirs_exist_ok=True)
    for precision, dtype in DTYPES.items():
        result = chat(examples, "--dtype", dtype, "--max-new-tokens", TOKENS, repository, PROMPT)
        assert result.stdout == greedy(precision) + "\n", result.stderr
    # Whoever reads the manifest gets the last one.
    assert doge_onnx.load(repository).manifest.precision == "int8"


def test_weights_beside_the_graph(examples, browse, greedy, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "MAX_EMBEDDED_BYTES", 0)
    out = tmp_path / "bundle"
    doge_onnx.export(TINY_CHECKPOINT, out, layout="hub", verify=False)
    assert (out / "onnx" / "model.onnx_data").stat().st_size > 10_000_000
    result = chat(examples, "--max-new-tokens", TOKENS, out, PROMPT)
    assert result.stdout == greedy("fp32") + "\n", result.stderr
    seen = browse(out)
    assert seen["answers"] == [greedy("fp32")]
    assert any(address.endswith("/onnx/model.onnx_data") for address in seen["requests"])


def test_the_snippet_for_a_program_of_ones_own(examples, hub, greedy, tmp_path):
    readme = (examples / "node" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```js\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "bundle").symlink_to(hub("int8"))
    (tmp_path / "node_modules").symlink_to(examples / "node_modules")
    prompt = "It was a dark and stormy night"
    changed = snippet.replace(prompt, PROMPT).replace("tokens: 60", f"tokens: {TOKENS}")
    (tmp_path / "main.mjs").write_text(changed, encoding="utf-8")
    result = subprocess.run(
        ["node", "main.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.removesuffix("\n") == greedy("int8")


def test_node_says_what_is_wrong(examples, hub, tiny_bundle, tmp_path):
    for arguments in (
        (),
        ("--max-new-tokens", "0", "x"),
        ("--max-new-tokens", "1.5", "x"),
        ("--nonsense", "x"),
        ("a", "b", "c"),
    ):
        result = chat(examples, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("usage: node chat.js ")
    window = with_window_state(hub("fp32"), tmp_path)
    for arguments, words in (
        (("/not/there", PROMPT), "there is no directory /not/there"),
        ((tmp_path, PROMPT), "doge_onnx.json"),
        ((tiny_bundle, PROMPT), "export with --layout hub"),
        ((window, PROMPT), "export without --state window"),
        (("--dtype", "q4", hub("fp32"), PROMPT), "there is no onnx/model_q4.onnx"),
        (("--dtype", "q5", hub("fp32"), PROMPT), "there is no dtype q5"),
        (("--dtype", "toString", hub("fp32"), PROMPT), "there is no dtype toString"),
        ((hub("fp32"), "word " * 3000), "the context length is 2048"),
    ):
        result = chat(examples, *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(rf"error: .*{words}.*\n", result.stderr), result.stderr


def test_the_server_says_what_is_wrong(examples, tmp_path):
    server = examples / "browser" / "server.js"
    for arguments in ((), ("a", "b"), ("--port", "x", "a"), ("--nonsense", "a")):
        result = subprocess.run(
            ["node", server, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("usage: node server.js ")
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    copy = shutil.copytree(examples / "browser", tmp_path / "elsewhere")
    result = subprocess.run(
        ["node", copy / "server.js", "a"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: transformers.js is not installed: npm ci --prefix examples\n"


def with_window_state(bundle, directory):
    copy = Path(shutil.copytree(bundle, directory / "window"))
    path = copy / "doge_onnx.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"growing"', '"window"'), encoding="utf-8")
    return copy


@pytest.mark.parametrize("precision", DTYPES)
def test_the_page_writes_the_text_that_python_writes(precision, browse, hub, greedy):
    seen = browse(hub(precision))
    assert seen["error"] is None
    assert seen["answers"] == [greedy(precision)]
    assert re.fullmatch(r"24 tokens, \d+\.\d tokens/s, first in \d+\.\d\d s", seen["speeds"][0])
    assert re.fullmatch(
        rf"doge-tiny · {DTYPES[precision]} · WebAssembly, \d+ threads?", seen["model"]
    )
    values = [step["value"] for step in seen["progress"] if step["visible"]]
    assert values == sorted(values)
    assert (len(set(values)) > 2, values[-1]) == (True, 1)


def test_the_build_that_transformers_js_fetches_has_all_operators(browse, hub, greedy):
    # The page names a build, which has more of them and is smaller. Who does not gets this one.
    seen = browse(hub("int4"), build="asyncify")
    assert seen["error"] is None
    assert seen["answers"] == [greedy("int4")]
    assert any(address.endswith(".asyncify.wasm") for address in seen["requests"])


def test_the_page_stops_when_asked(browse, hub):
    seen = browse(hub("fp32"), maxNewTokens=2000, stop=True)
    assert seen["error"] is None
    assert 0 < int(seen["speeds"][0].split()[0]) < 2000


def test_a_conversation_by_the_chat_template(examples, browse, hub, greedy, tmp_path):
    bundle = Path(shutil.copytree(hub("fp32"), tmp_path / "bundle"))
    (bundle / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    seal(bundle, read_manifest(bundle))
    said = ["Tell me of the girl", "And then"]
    model, text, expected = doge_onnx.load(bundle), "", []
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for content in said:
        text += f"user: {content}\nassistant:"
        # A template has all that there is: no token is put before it.
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected.append(model.generate(ids, max_new_tokens=8, temperature=0).text)
        text += f" {expected[-1]}\n"
    result = chat(examples, "--max-new-tokens", 8, bundle, stdin="\n".join(said))
    assert result.stdout == "".join(answer + "\n" for answer in expected)
    seen = browse(bundle, prompts=said, maxNewTokens=8)
    assert seen["answers"] == expected
    assert seen["hint"].startswith("Ask something.")


def test_the_page_says_what_is_wrong(browse, hub, tmp_path):
    broken = Path(shutil.copytree(hub("int8"), tmp_path / "broken"))
    graph = broken / "onnx" / "model_quantized.onnx"
    graph.write_bytes(graph.read_bytes()[:100_000])
    for bundle, words in (
        (tmp_path / "missing", "There is no bundle at /bundle/doge_onnx.json"),
        (broken, "Can't create a session"),
    ):
        seen = browse(bundle, prompts=[])
        assert words in seen["error"]
        assert seen["model"] == "No model"


def test_the_page_refuses_a_text_that_is_too_long_and_goes_on(browse, hub, greedy):
    seen = browse(hub("fp32"), prompts=["word " * 3000, PROMPT])
    assert seen["error"] is None
    assert seen["answers"] == [greedy("fp32")]


def test_webgpu_runs_every_operator(browse, hub, greedy):
    seen = browse(hub("int4"), "?device=webgpu", flags=SOFTWARE_WEBGPU, maxNewTokens=3)
    assert seen["model"] == "doge-tiny · q4 · WebGPU"
    assert seen["error"] is None
    (answer,) = seen["answers"]
    assert answer
    assert greedy("int4").startswith(answer)


def test_the_layout_is_known_to_whoever_reads_the_manifest(hub):
    for precision, name in (("fp32", ""), ("int8", "_quantized"), ("int4", "_q4")):
        opened = Bundle.open(hub(precision))
        assert opened.manifest.graph == f"onnx/model{name}.onnx"
        genai = opened.read_json("genai_config.json")
        assert genai["model"]["decoder"]["filename"] == opened.manifest.graph
