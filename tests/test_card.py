"""The model card: what it says to programs and to people, and that its snippets run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import huggingface_hub
import javascript
import numpy as np
import pytest
import watching
from conftest import TINY_CHECKPOINT
from environments import environment
from tokenizers import Tokenizer

import doge_onnx
from doge_onnx.bundle import Bundle, read_manifest
from doge_onnx.export import card, metadata
from doge_onnx.export.checkpoint import Source
from doge_onnx.export.exporter import export
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.export.snippets import PLACE, snippets

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "Hey how are you doing?"
HUB_ID = "SmallDoge/Doge-20M"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD = """---
license: apache-2.0
language:
- en
- no
datasets:
- SmallDoge/SmallTalks
tags: [doge]
base_model: somebody/else
pipeline_tag: question-answering
---
# Doge
"""


def read_block(directory: Path) -> dict:
    """What the Hub's own reader makes of a card."""
    loaded = huggingface_hub.ModelCard.load(directory / "README.md")
    assert loaded.data.to_dict() == huggingface_hub.metadata_load(directory / "README.md")
    return loaded.data.to_dict()


def code_blocks(directory: Path, language: str) -> list[str]:
    text = (directory / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```\n", text, flags=re.DOTALL)


def source_with(tmp_path: Path, content: str | bytes, revision: str | None = COMMIT) -> Source:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "README.md").write_bytes(data)
    return Source(tmp_path, HUB_ID if revision else tmp_path.name, revision)


# --- what a card says to programs -------------------------------------------------------------


def test_the_metadata_of_a_local_checkpoint_claims_nothing_that_is_not_known(tiny_bundle):
    assert read_block(tiny_bundle) == {
        "library_name": "doge-onnx",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "doge", "onnxruntime-genai", "fp32"],
    }


def test_the_metadata_of_a_checkpoint_of_the_hub(tiny_bundle, tmp_path):
    config = DogeConfig.from_file(TINY_CHECKPOINT / "config.json")
    source = source_with(tmp_path, GOOD)
    manifest = read_manifest(tiny_bundle)
    manifest = dataclasses.replace(manifest, precision="int4")
    text = card.render(source, config, metadata.inherited(source), manifest, conversational=True)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert read_block(tmp_path) == {
        "license": "apache-2.0",
        "language": ["en", "no"],
        "datasets": ["SmallDoge/SmallTalks"],
        "base_model": HUB_ID,
        "base_model_relation": "quantized",
        "library_name": "doge-onnx",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "doge", "onnxruntime-genai", "int4", "conversational"],
    }
    # Nothing is quantized: the Hub is not told that it was.
    plain = dataclasses.replace(manifest, precision="fp32")
    assert "base_model_relation" not in metadata.compose(source, config, plain, [], {})


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Path:
    """A bundle with a window state, of a checkpoint with a tokenizer and a card."""
    directory = tmp_path_factory.mktemp("window") / "model"
    model = checkpoints.make(directory, num_hidden_layers=1, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((TINY_CHECKPOINT / name).read_bytes())
    (model / "README.md").write_text(GOOD, encoding="utf-8")
    return export(model, model.parent / "out", state="window", verify=False).path


@pytest.mark.slow
def test_an_export_takes_the_license_over(window):
    block = read_block(window)
    assert block["license"] == "apache-2.0"
    assert block["language"] == ["en", "no"]
    assert "base_model" not in block


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# no metadata\n\n---\nlicense: mit\n---\n", {}),
        ("---\n---\n", {}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\nlanguage: no\r\n---\r\n",
         {"license": "mit", "language": "no"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: other\nlicense_name: x\nlicense_link: https://a.b/c\n---\n",
         {"license": "other", "license_name": "x", "license_link": "https://a.b/c"}),
        ("---\nlicense_link: LICENSE.md\n---\n",
         {"license_link": f"https://huggingface.co/{HUB_ID}/blob/{COMMIT}/LICENSE.md"}),
    ],
)  # fmt: skip
def test_what_is_taken_over_from_a_card(tmp_path, content, expected):
    assert metadata.inherited(source_with(tmp_path, content)) == expected


def test_a_file_beside_a_local_card_is_no_link(tmp_path):
    source = source_with(tmp_path, "---\nlicense_link: LICENSE\n---\n", revision=None)
    assert metadata.inherited(source) == {}


BOMB = "---\na: &a [x, x]\n" + "".join(
    f"{after}: &{after} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, after in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        # Values of other types and forms.
        "license: null",
        "license: 3",
        "license: true",
        "license: 2024-01-01",
        "license: {mit: yes}",
        "license: [[mit], 3, {a: b}]",
        "license: 'mit\n\n  # injected'",
        "license: ''",
        "license: " + "m" * 5000,
        "license_name: [a, b]",
        "license_link: javascript:alert(1)",
        "language: 7",
        "language: yes",
        "datasets: ../../etc/passwd",
        "- license: mit",
        "license",
        # Objects, which a careless reader would make.
        'license: !!python/object/apply:os.system ["touch executed"]',
        'license: !!python/name:os.system ""',
        "license: !!binary bWl0",
        "license: !!int ''",
        "license: !!timestamp x",
        # Not YAML at all, or too much of it.
        "license: [mit",
        "license: *nothing",
        "license: \x00",
        "\tlicense: mit",
        "license: mit\n--- \nmore: 1\n...\n- x",
        "x: " + "[" * 50_000,
        "x: &x [*x]\nlicense: *x",
    ],
)
def test_a_hostile_card_is_a_card_without_metadata(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    found = metadata.inherited(source_with(tmp_path, f"---\n{content}\n---\n"))
    if "more: 1" in content:
        # The first line of dashes ends the block.
        assert found == {"license": "mit"}
    else:
        assert found == {}
    assert not Path("executed").exists()


@pytest.mark.parametrize("end", ["license: *x\n---\n", "<<: *x\nlicense: mit\n---\n"])
def test_a_card_that_would_explode_does_not(tmp_path, end):
    found = metadata.inherited(source_with(tmp_path, BOMB + end))
    assert found == ({"license": "mit"} if "mit" in end else {})


@pytest.mark.parametrize("content", [b"---\nlicense: mit\nx: \xff\xfe\n---\n", b"\xff" * 100])
def test_a_card_that_is_no_text(tmp_path, content):
    assert metadata.inherited(source_with(tmp_path, content)) in ({"license": "mit"}, {})


def test_a_huge_card_is_read_in_part_and_said_so(tmp_path):
    filler = "x: " + "y" * 200_000
    said: list[str] = []
    source = source_with(tmp_path, f"---\nlicense: mit\n{filler}\n---\n")
    assert metadata.inherited(source, said.append) == {}
    assert said == [f"the model card of {HUB_ID} says nothing of a license: its metadata does not "
                    "end within 131072 bytes"]  # fmt: skip
    source = source_with(tmp_path, f"---\nlicense: mit\n---\n{filler}")
    assert metadata.inherited(source) == {"license": "mit"}


def test_a_card_that_is_a_directory(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert metadata.inherited(Source(tmp_path, "x", None)) == {}


# --- what it says to people -------------------------------------------------------------------


def test_the_figures_of_the_comparison_are_shown(main):
    text = (main.path / "README.md").read_text(encoding="utf-8")
    parity = main.report.parity
    assert f"| prompt in one step (prefill) | {parity.prefill:.1e} |\n" in text
    assert f"| tolerance | {parity.tolerance:.1e} |\n" in text
    total = parity.greedy_total
    assert f"| greedy tokens that match | {total} of {total} |\n" in text
    assert parity.reference in text


def test_the_card_says_how_large_everything_is(tiny_bundle):
    text = (tiny_bundle / "README.md").read_text(encoding="utf-8")
    size = (tiny_bundle / "model.onnx").stat().st_size
    assert f"| graph and weights | {size / 1e6:.1f} MB |\n" in text
    # 4 layers, keys and values, 2 heads, 72 channels of 4 bytes.
    assert "| state | float32, 4,608 bytes per token |\n" in text
    assert Bundle.open(tiny_bundle).manifest.files["README.md"]["size"] == len(text.encode())


def test_a_name_cannot_write_into_the_card(tiny_bundle):
    source = Source(TINY_CHECKPOINT, "a`b\n# c\n---", None)
    config = DogeConfig.from_file(TINY_CHECKPOINT / "config.json")
    text = card.render(source, config, {}, read_manifest(tiny_bundle))
    assert "# a'b # c ---, exported to ONNX\n" in text


# --- the snippets -----------------------------------------------------------------------------


def run(command: list, code: str, bundle: Path, **options) -> subprocess.CompletedProcess:
    """Run a snippet exactly as it stands in the card, but for the bundle's place."""
    assert PLACE in code
    return subprocess.run(
        [*command, code.replace(PLACE, str(bundle))],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        check=True,
        timeout=120,
        **options,
    )


def test_the_python_snippet_runs(tiny_bundle):
    code = code_blocks(tiny_bundle, "python")[0]
    expected = doge_onnx.load(tiny_bundle).generate(PROMPT, max_new_tokens=100)
    assert expected.finish_reason == "length"
    assert run([sys.executable, "-c"], code, tiny_bundle).stdout == expected.text + "\n"


def test_without_a_tokenizer_the_snippet_takes_token_ids(second):
    (code,) = code_blocks(second.path, "python")
    expected = doge_onnx.load(second.path).generate([1, 2, 3], max_new_tokens=100)
    assert run([sys.executable, "-c"], code, second.path).stdout == f"{expected.token_ids}\n"


def prompt_ids(bundle: Path) -> list[int]:
    return Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(PROMPT).ids


def clear_tokens(model, prompt: list[int], generated: list[int]) -> int:
    """How many greedy tokens come before two are so close that another build may prefer the other.

    Builds of ONNX Runtime differ in the order of their sums: by less than this in float32.
    """
    logits, _ = model.forward([prompt + generated], logits="all")
    best = np.sort(logits[0, len(prompt) - 1 : -1], axis=-1)[:, -2:]
    close = np.flatnonzero(best[:, 1] - best[:, 0] < 1e-3)
    return int(close[0]) if len(close) else len(generated)


@pytest.mark.external
@pytest.mark.parametrize("target", ["tiny_bundle", "tiny_portable_bundle"])
def test_the_snippet_for_onnxruntime_genai_runs(target, request):
    bundle = request.getfixturevalue(target)
    _, code = code_blocks(bundle, "python")
    code += "\nimport sys; print([int(i) for i in generator.get_sequence(0)], file=sys.stderr)\n"
    result = run([environment(ROOT / "tests/requirements/genai.txt"), "-c"], code, bundle)
    sequence = json.loads(result.stderr)
    prompt = prompt_ids(bundle)
    assert len(sequence) == len(prompt) + 100
    assert sequence[: len(prompt)] == prompt
    generated = sequence[len(prompt) :]
    model = doge_onnx.load(bundle)
    count = clear_tokens(model, prompt, generated)
    expected = model.generate(PROMPT, max_new_tokens=count, temperature=0)
    assert count > 10
    assert generated[:count] == expected.token_ids
    assert result.stdout.startswith(expected.text)


TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ bos_token + message['role'] + ': ' + message['content'] + eos_token }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ bos_token + 'assistant: ' }}{%- endif -%}"
)


@pytest.fixture(scope="module", params=["chat_template.jinja", "tokenizer_config.json"])
def conversational(request, tmp_path_factory) -> Path:
    """doge-tiny as if it were tuned on messages, with its template in either of the places."""
    root = tmp_path_factory.mktemp("conversational")
    model = shutil.copytree(TINY_CHECKPOINT, root / "model")
    content = TEMPLATE
    if request.param == "tokenizer_config.json":
        config = json.loads((model / request.param).read_text(encoding="utf-8"))
        content = json.dumps(config | {"chat_template": TEMPLATE})
    (model / request.param).write_text(content, encoding="utf-8")
    return export(model, root / "bundle", layout="hub", verify=False).path


@pytest.mark.external
def test_the_snippets_of_a_conversational_model_send_a_message(conversational):
    assert "conversational" in read_block(conversational)["tags"]
    python, genai = code_blocks(conversational, "python")
    (javascript_code,) = code_blocks(conversational, "js")
    model = doge_onnx.load(conversational)
    messages = [{"role": "user", "content": PROMPT}]
    whole = model.generate(messages, max_new_tokens=100)
    assert run([sys.executable, "-c"], python, conversational).stdout == whole.text + "\n"
    count = clear_tokens(model, watching.prompt_ids(model, messages), whole.token_ids)
    assert count > 10
    clear = model.generate(messages, max_new_tokens=min(count, 40)).text
    interpreter = environment(ROOT / "tests/requirements/genai.txt")
    assert run([interpreter, "-c"], genai, conversational).stdout.startswith(clear)
    if (reason := javascript.lacking()) is not None:
        pytest.skip(reason)
    javascript.packages(EXAMPLES)
    command = ["node", "--input-type=module", "--eval"]
    shown = run(command, javascript_code, conversational, cwd=EXAMPLES).stdout
    assert shown.startswith(clear)


def test_a_template_that_cannot_be_used_is_none_to_the_card(tmp_path, tiny_bundle):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text('{"chat_template": 1}', encoding="utf-8")
    draft = Bundle.draft(copy, read_manifest(copy))
    config = DogeConfig.from_file(TINY_CHECKPOINT / "config.json")
    card.write(Source(TINY_CHECKPOINT, "tiny", None), config, {}, draft)
    assert "conversational" not in read_block(copy)["tags"]


@pytest.mark.external
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_the_snippet_for_transformers_js_runs(kind, tiny_hub_bundle):
    bundle = tiny_hub_bundle(kind)
    assert "transformers.js" in read_block(bundle)["tags"]
    if (reason := javascript.lacking()) is not None:
        pytest.skip(reason)
    javascript.packages(EXAMPLES)
    (code,) = code_blocks(bundle, "js")
    command = ["node", "--input-type=module", "--eval"]
    shown = run(command, code, bundle, cwd=EXAMPLES).stdout
    model = doge_onnx.load(bundle)
    prompt = prompt_ids(bundle)
    whole = model.generate(PROMPT, max_new_tokens=100)
    count = clear_tokens(model, prompt, whole.token_ids)
    assert count > 10
    assert shown.startswith(model.generate(PROMPT, max_new_tokens=count).text)
    assert len(shown) > 100


def test_the_card_of_the_hub_layout_is_that_of_a_model_for_transformers_js(tiny_hub_bundle):
    hub_layout = tiny_hub_bundle("fp32")
    shown = read_block(hub_layout)
    assert shown["library_name"] == "transformers.js"
    assert {"transformers.js", "onnxruntime-genai"} <= set(shown["tags"])
    text = (hub_layout / "README.md").read_text(encoding="utf-8")
    size = (hub_layout / "onnx" / "model.onnx").stat().st_size
    assert f"| graph and weights | {size / 1e6:.1f} MB |\n" in text


@pytest.mark.slow
def test_a_window_has_no_snippet_for_tools_that_cannot_feed_it(window):
    (code,) = code_blocks(window, "python")
    assert "doge_onnx.load" in code
    assert "onnxruntime-genai" not in read_block(window)["tags"]


def test_a_state_in_half_precision_is_not_for_a_configuration_for_processors(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    half = dataclasses.replace(manifest.state, dtype="float16")
    shown = snippets(dataclasses.replace(manifest, state=half))
    assert [snippet.tool for snippet in shown] == ["doge-onnx"]


def test_half_a_tokenizer_is_none_to_onnxruntime_genai(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    files = {name: entry for name, entry in manifest.files.items() if "_config" not in name}
    shown = snippets(dataclasses.replace(manifest, files=files))
    assert [snippet.tool for snippet in shown] == ["doge-onnx"]


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [
        ("onnx/model.onnx", "fp32"),
        ("onnx/model_quantized.onnx", "q8"),
        ("onnx/model_q4.onnx", "q4"),
        ("onnx/model_fp16.onnx", "fp16"),
        ("model.onnx", None),
    ],
)
def test_the_snippet_for_transformers_js_is_shown_where_it_finds_the_graph(
    tiny_bundle, graph, dtype
):
    manifest = dataclasses.replace(read_manifest(tiny_bundle), graph=graph)
    codes = [shown.code for shown in snippets(manifest) if shown.language == "js"]
    if dtype is None:
        assert codes == []
        return
    (code,) = codes
    assert f'dtype: "{dtype}" }}' in code
    assert "num_key_value_heads: 2,\n  head_dim: 72," in code
    large = dataclasses.replace(manifest, files={**manifest.files, f"{graph}_data": {}})
    assert f'dtype: "{dtype}", use_external_data_format: true }}' in snippets(large)[-1].code


@pytest.mark.parametrize(
    ("graph", "state", "change"),
    [
        ("onnx/model.onnx", {"kind": "window"}, {}),
        ("onnx/model_quantized.onnx", {"dtype": "float16"}, {"device": "cuda"}),
    ],
)
def test_what_transformers_js_cannot_run_has_no_snippet_for_it(tiny_bundle, graph, state, change):
    manifest = read_manifest(tiny_bundle)
    state = dataclasses.replace(manifest.state, **state)
    manifest = dataclasses.replace(manifest, graph=graph, state=state, **change)
    assert "js" not in [shown.language for shown in snippets(manifest)]
