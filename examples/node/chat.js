// Chats with a bundle in a terminal, or continues a text.
//
//   node chat.js [--dtype q4] [--max-new-tokens 200] [--temperature 0.8] BUNDLE [PROMPT]
//
// BUNDLE is a directory, or an id on the Hugging Face Hub. Without a prompt it asks for one, again
// and again. The text goes to standard output, everything else to standard error.

import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import path from "node:path";
import readline from "node:readline/promises";
import { parseArgs } from "node:util";
import { generate, load } from "../javascript/doge.js";

// Without this, and before the import, ONNX Runtime leaves files in the home directory.
process.env.ORT_DISABLE_TELEMETRY ??= "1";
const transformers = await import("@huggingface/transformers");

const USAGE =
  "usage: node chat.js [--dtype fp32|fp16|q8|q4] [--max-new-tokens N] [--temperature T] BUNDLE [PROMPT]";

function readArguments() {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: {
        dtype: { type: "string" },
        "max-new-tokens": { type: "string", default: "200" },
        temperature: { type: "string", default: "0" },
      },
    });
    const maxNewTokens = Number(values["max-new-tokens"]);
    const temperature = Number(values.temperature);
    if (![1, 2].includes(positionals.length)) throw new Error("give a bundle, and one prompt or none");
    if (!Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
      throw new Error("--max-new-tokens must be a whole number, 1 or more");
    }
    if (!(temperature >= 0)) throw new Error("--temperature must be 0 or more");
    const [bundle, prompt] = positionals;
    return { bundle, prompt, dtype: values.dtype, maxNewTokens, temperature };
  } catch (error) {
    console.error(`${USAGE}\n${error.message}`);
    process.exit(2);
  }
}

/** What transformers.js calls the bundle, and a function that reads its text files. */
function locate(bundle) {
  if (existsSync(bundle)) {
    const directory = path.resolve(bundle);
    return [directory, (name) => readFile(path.join(directory, name), "utf8")];
  }
  if (!/^\w[\w.-]*(\/\w[\w.-]*)?$/.test(bundle)) throw new Error(`there is no directory ${bundle}`);
  const { remoteHost, remotePathTemplate } = transformers.env;
  const address = remoteHost + remotePathTemplate.replace("{model}", bundle).replace("{revision}", "main");
  const read = async (name) => {
    const response = await transformers.env.fetch(address + name);
    if (!response.ok) throw new Error(`${address + name}: ${response.status} ${response.statusText}`);
    return response.text();
  };
  return [bundle, read];
}

/** Shows on one line of a terminal how much of the files has been read. */
function showProgress(event) {
  if (event.status !== "progress_total" || !process.stderr.isTTY) return;
  process.stderr.write(`\rloading ${Math.round(event.progress)} %${event.progress >= 100 ? "\n" : ""}`);
}

async function answer(loaded, messages, options) {
  const result = await generate(transformers, loaded, messages, {
    ...options,
    onText: (piece) => process.stdout.write(piece),
  });
  process.stdout.write("\n");
  // A single token has no time of its own: it is the prompt's.
  const speed = result.tokens > 1 ? `, ${result.tokensPerSecond.toFixed(1)} tokens/s` : "";
  console.error(`${result.tokens} token${result.tokens === 1 ? "" : "s"}${speed}`);
  return result.text;
}

const { bundle, prompt, dtype, ...options } = readArguments();
try {
  const [name, read] = locate(bundle);
  const loaded = await load(transformers, name, read, { dtype, progress_callback: showProgress });
  const messages = [];
  if (prompt !== undefined) {
    await answer(loaded, [{ role: "user", content: prompt }], options);
  } else {
    const terminal = readline.createInterface({ input: process.stdin, output: process.stderr });
    terminal.setPrompt("> ");
    terminal.prompt();
    for await (const content of terminal) {
      if (content.trim()) {
        messages.push({ role: "user", content });
        messages.push({ role: "assistant", content: await answer(loaded, messages, options) });
      }
      terminal.prompt();
    }
  }
} catch (error) {
  const reason = error.cause ? `${error.message} (${error.cause.message})` : error.message;
  console.error(`error: ${reason}`);
  process.exitCode = 1;
}
