// Runs the model outside of the page's own thread, so that the page stays responsive.
//
// Takes messages { type: "load" | "generate" | "stop" }, and answers with "progress", "ready",
// "text", "done" and "error".

import * as transformers from "/transformers/transformers.min.js";
import { generate, load } from "/javascript/doge.js";

const { env } = transformers;
// The bundle is where the page is, at an address like those of the Hub.
env.remoteHost = `${self.location.origin}/`;
env.remotePathTemplate = "{model}/";
// The server is near, and another bundle may be at the same address tomorrow. A page on the web
// leaves these two as they are: then a model is fetched once.
env.useBrowserCache = false;
env.useWasmCache = false;

let loaded = null;
const stopping = new transformers.InterruptableStoppingCriteria();

async function read(name) {
  const address = `/bundle/${name}`;
  const response = await fetch(address);
  if (response.status === 404 && name === "doge_onnx.json") {
    throw new Error(`There is no bundle at ${address}. Was the server started with its directory?`);
  }
  if (!response.ok) throw new Error(`${address}: ${response.status} ${response.statusText}`);
  return response.text();
}

/** Lets messages in. Steps on the CPU alone never do: they are done when they return. */
function nextTask() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

async function loadBundle({ dtype, device }) {
  // The build with WebGPU is twice as large and slower on the CPU.
  const build = `/onnxruntime/ort-wasm-simd-threaded${device === "webgpu" ? ".asyncify" : ""}`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  loaded = await load(transformers, "bundle", read, {
    dtype,
    device,
    progress_callback: (event) => {
      if (event.status !== "progress_total") return;
      postMessage({ type: "progress", loaded: event.loaded, total: event.total });
    },
  });
  const forward = loaded.model.forward.bind(loaded.model);
  loaded.model.forward = async (inputs) => {
    await nextTask();
    return forward(inputs);
  };
  const { manifest, tokenizer } = loaded;
  postMessage({
    type: "ready",
    name: manifest.source.model,
    dtype: loaded.dtype,
    device,
    chat: Boolean(tokenizer.chat_template),
    threads: env.backends.onnx.wasm.numThreads,
  });
}

async function answer({ messages, maxNewTokens, temperature }) {
  stopping.reset();
  const result = await generate(transformers, loaded, messages, {
    maxNewTokens,
    temperature,
    stoppingCriteria: stopping,
    onText: (text) => postMessage({ type: "text", text }),
  });
  postMessage({ type: "done", ...result });
}

self.onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await loadBundle(data);
    else if (data.type === "generate") await answer(data);
    else if (data.type === "stop") stopping.interrupt();
  } catch (error) {
    postMessage({ type: "error", message: error.message ?? String(error) });
  }
};
