// Runs a bundle of doge-onnx with transformers.js, in a browser and in Node alike.
//
// Knows what transformers.js cannot: it has no model type "doge". It does not know where files come
// from and where text goes; its callers hand it the library, and a function that reads a file.

// Where `doge-onnx export --layout hub` puts the graph, by what transformers.js calls its precision.
const GRAPHS = {
  fp32: "onnx/model.onnx",
  fp16: "onnx/model_fp16.onnx",
  q8: "onnx/model_quantized.onnx",
  q4: "onnx/model_q4.onnx",
};

/**
 * What transformers.js has to be told of a bundle.
 *
 * @param {object} manifest The bundle's doge_onnx.json.
 * @param {object} config The bundle's config.json.
 * @returns {object} A config that it understands: the graph has the inputs and outputs of a Llama,
 *   with key and value rows that have a channel or more for the gates.
 */
export function llamaConfig(manifest, config) {
  const { state } = manifest;
  if (state.kind !== "growing") {
    throw new Error(
      "transformers.js cannot run a state of constant size; export without --state window",
    );
  }
  return {
    ...config,
    model_type: "llama",
    architectures: ["LlamaForCausalLM"],
    num_hidden_layers: state.num_layers,
    num_key_value_heads: state.num_heads,
    head_dim: state.row_size,
  };
}

/**
 * Loads a bundle.
 *
 * @param {object} transformers The module of transformers.js.
 * @param {string} path What it calls the bundle: a directory, or an id on the Hub.
 * @param {(name: string) => Promise<string>} read Reads one of the bundle's text files.
 * @param {object} [options]
 * @param {string} [options.dtype] A key of `GRAPHS`; by default what the manifest is about.
 * @param {string} [options.device] As transformers.js takes it, "wasm" or "webgpu" for example.
 * @param {Function} [options.progress_callback] As transformers.js takes it.
 * @returns {Promise<object>} What `generate` takes.
 */
export async function load(transformers, path, read, { dtype, device, progress_callback } = {}) {
  const manifest = JSON.parse(await read("doge_onnx.json"));
  const config = llamaConfig(manifest, JSON.parse(await read("config.json")));
  dtype ??= Object.keys(GRAPHS).find((name) => GRAPHS[name] === manifest.graph);
  if (!Object.hasOwn(GRAPHS, dtype ?? "")) {
    throw new Error(
      dtype
        ? `there is no dtype ${dtype}; choose from ${Object.keys(GRAPHS).join(", ")}`
        : `transformers.js does not look for ${manifest.graph}; export with --layout hub`,
    );
  }
  const tokenizer = await transformers.AutoTokenizer.from_pretrained(path, { config });
  // Newer checkpoints have a file of its own for it, which transformers.js does not look for.
  if ("chat_template.jinja" in manifest.files) {
    tokenizer.chat_template ??= await read("chat_template.jinja");
  }
  // The manifest is about one graph; a repository may have those of other exports, too.
  const exists = async (name) =>
    (await transformers.ModelRegistry.get_file_metadata(path, name)).exists;
  if (!(await exists(GRAPHS[dtype]))) {
    throw new Error(`there is no ${GRAPHS[dtype]}: choose another dtype, or export this one, too`);
  }
  const model = await transformers.LlamaForCausalLM.from_pretrained(path, {
    config,
    dtype,
    device,
    // Large weights are beside their graph.
    use_external_data_format: await exists(`${GRAPHS[dtype]}_data`),
    progress_callback,
  });
  return { manifest, tokenizer, model, dtype };
}

/**
 * Answers a chat, or continues a text if the model has no chat template.
 *
 * @param {object} transformers The module of transformers.js.
 * @param {object} loaded What `load` returned.
 * @param {{role: string, content: string}[]} messages Without a template, only the last counts.
 * @param {object} [options]
 * @param {number} [options.maxNewTokens] Less is generated where the context length ends.
 * @param {number} [options.temperature] 0 takes the most likely token each time.
 * @param {(text: string) => void} [options.onText] Called with each piece of text.
 * @param {object} [options.stoppingCriteria] As transformers.js takes it.
 * @returns {Promise<object>} The whole text, numbers of tokens, and how fast they came.
 */
export async function generate(
  transformers,
  { manifest, tokenizer, model },
  messages,
  { maxNewTokens = 200, temperature = 0, onText = () => {}, stoppingCriteria = null } = {},
) {
  const inputs = tokenizer.chat_template
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(messages.at(-1).content);
  const promptTokens = inputs.input_ids.dims.at(-1);
  const room = manifest.context_length - promptTokens;
  if (room < 1) {
    throw new Error(
      `the text has ${promptTokens} tokens, and the context length is ${manifest.context_length}`,
    );
  }
  let text = "";
  const times = [];
  const streamer = new transformers.TextStreamer(tokenizer, {
    skip_prompt: true,
    clean_up_tokenization_spaces: false,
    callback_function: (piece) => {
      text += piece;
      onText(piece);
    },
    token_callback_function: () => times.push(performance.now()),
  });
  const started = performance.now();
  await model.generate({
    ...inputs,
    max_new_tokens: Math.min(maxNewTokens, room),
    do_sample: temperature > 0,
    ...(temperature > 0 && { temperature }),
    streamer,
    stopping_criteria: stoppingCriteria,
  });
  return {
    text,
    promptTokens,
    tokens: times.length,
    firstTokenSeconds: (times[0] - started) / 1000,
    // Without the first token, which is the prompt's.
    tokensPerSecond: (1000 * (times.length - 1)) / (times.at(-1) - times[0]),
  };
}
