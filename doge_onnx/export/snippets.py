"""The code that a model card shows for each tool that can run the bundle.

Knows which tools load which bundles. The tests run the code unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from doge_onnx.manifest import Manifest

# Stands for the bundle's directory; readers and tests replace it.
PLACE = "path/to/this/directory"

_PYTHON = f"""\
import doge_onnx

model = doge_onnx.load("{PLACE}")
print(model.generate("Hey how are you doing?", max_new_tokens=100).text)
"""
_PYTHON_CHAT = f"""\
import doge_onnx

model = doge_onnx.load("{PLACE}")
messages = [{{"role": "user", "content": "Hey how are you doing?"}}]
print(model.generate(messages, max_new_tokens=100).text)
"""
_PYTHON_IDS = f"""\
import doge_onnx

model = doge_onnx.load("{PLACE}")
print(model.generate([1, 2, 3], max_new_tokens=100).token_ids)
"""
_GENAI_TEXT = """\
# As the model was trained: with the token that begins a text.
tokenizer.update_options(add_special_tokens="true")
prompt = "Hey how are you doing?"
"""
_GENAI_CHAT = """\
messages = '[{"role": "user", "content": "Hey how are you doing?"}]'
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
"""
_GENAI = f"""\
import os

# Without this, ONNX Runtime and genai leave files in your home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime_genai as og

model = og.Model("{PLACE}")
tokenizer = og.Tokenizer(model)
%spieces = tokenizer.create_stream()
ids = tokenizer.encode(prompt)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 100)
generator = og.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
    print(pieces.decode(generator.get_next_tokens()[0]), end="", flush=True)
"""
_JAVASCRIPT_TEXT = 'const inputs = tokenizer("Hey how are you doing?");\n'
_JAVASCRIPT_CHAT = """\
const messages = [{ role: "user", content: "Hey how are you doing?" }];
const form = { add_generation_prompt: true, return_dict: true };
const inputs = tokenizer.apply_chat_template(messages, form);
"""
# transformers.js does not look for this file.
_JAVASCRIPT_TEMPLATE = """\
tokenizer.chat_template = await readFile(`${bundle}/chat_template.jinja`, "utf8");
"""
# Filled in with the directory, the number of heads, the size of a row, the dtype, options of a
# large model, and the prompt.
_JAVASCRIPT = """\
import { readFile } from "node:fs/promises";

// Without this, and before the import, ONNX Runtime leaves files in your home directory.
process.env.ORT_DISABLE_TELEMETRY ??= "1";
const transformers = await import("@huggingface/transformers");
const { AutoTokenizer, LlamaForCausalLM, TextStreamer } = transformers;

const bundle = "%s";
const config = {
  ...JSON.parse(await readFile(`${bundle}/config.json`)),
  // It does not know Doge, and runs the graph as a Llama with rows that hold the gates, too.
  model_type: "llama",
  num_key_value_heads: %d,
  head_dim: %d,
};
const options = { config, dtype: "%s"%s };
const tokenizer = await AutoTokenizer.from_pretrained(bundle, { config });
const model = await LlamaForCausalLM.from_pretrained(bundle, options);
const streamer = new TextStreamer(tokenizer, { skip_prompt: true });
%sawait model.generate({ ...inputs, max_new_tokens: 100, do_sample: false, streamer });
"""
# The dtype by which transformers.js asks for a graph of that name.
_JAVASCRIPT_DTYPES = {
    "onnx/model.onnx": "fp32",
    "onnx/model_fp16.onnx": "fp16",
    "onnx/model_quantized.onnx": "q8",
    "onnx/model_q4.onnx": "q4",
}


@dataclass(frozen=True)
class Snippet:
    """How one tool runs the bundle.

    Attributes:
        tool: Its name.
        tag: The Hub's tag for models that it loads, or None if the Hub has none.
        language: Of the code, as Markdown knows it.
        code: The code itself.
    """

    tool: str
    tag: str | None
    language: str
    code: str


def snippets(manifest: Manifest, conversational: bool = False) -> list[Snippet]:
    """The snippets of all tools that can run the bundle.

    Args:
        manifest: With its list of files.
        conversational: Whether the model has a chat template; then the prompt is a message.
    """
    code = _PYTHON_CHAT if conversational else _PYTHON
    if "tokenizer.json" not in manifest.files:
        code = _PYTHON_IDS
    found = [Snippet("doge-onnx", None, "python", code)]
    # onnxruntime-genai needs both files of the tokenizer. Its configuration here is for the CPU,
    # and a state in half precision is for GPUs.
    wanted = {"genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    if wanted <= manifest.files.keys() and manifest.state.dtype in ("float32", "int8"):
        code = _GENAI % (_GENAI_CHAT if conversational else _GENAI_TEXT)
        found.append(Snippet("onnxruntime-genai", "onnxruntime-genai", "python", code))
    javascript = _javascript(manifest, conversational)
    if javascript is not None:
        found.append(Snippet("transformers.js in Node", "transformers.js", "js", javascript))
    return found


def _javascript(manifest: Manifest, conversational: bool) -> str | None:
    """The snippet for transformers.js, or None where that cannot run the bundle."""
    state = manifest.state
    dtype = _JAVASCRIPT_DTYPES.get(manifest.graph)
    # transformers.js feeds a growing state, in the type that the graph asks for.
    if dtype is None or state.kind != "growing":
        return None
    # Quantized weights that are made for CUDA meet activations in half precision.
    if dtype in ("q8", "q4") and manifest.device != "cpu":
        return None
    if not {"tokenizer.json", "tokenizer_config.json"} <= manifest.files.keys():
        return None
    large = f"{manifest.graph}_data" in manifest.files
    more = ", use_external_data_format: true" if large else ""
    prompt = _JAVASCRIPT_TEXT
    if conversational:
        own_file = "chat_template.jinja" in manifest.files
        prompt = (_JAVASCRIPT_TEMPLATE if own_file else "") + _JAVASCRIPT_CHAT
    return _JAVASCRIPT % (PLACE, state.num_heads, state.row_size, dtype, more, prompt)
