// Serves the page, a bundle, and transformers.js with ONNX Runtime out of node_modules.
//
//   node server.js [--port 8000] BUNDLE
//
// Nothing comes from elsewhere. Any other web server does, too, if it sends the headers below.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".mjs": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};
const HEADERS = {
  // A page may have threads that share memory only if nothing from elsewhere is in it.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  // Ask each time: an export or an update may have changed any of the files.
  "Cache-Control": "no-cache",
};

/** The directories that are served, by the beginning of their addresses; the first fits. */
function directories(bundle) {
  const here = path.dirname(fileURLToPath(import.meta.url));
  const transformers = createRequire(import.meta.url).resolve("@huggingface/transformers");
  const onnxruntime = createRequire(transformers).resolve("onnxruntime-web");
  return [
    ["/bundle/", path.resolve(bundle)],
    ["/javascript/", path.join(here, "..", "javascript")],
    ["/transformers/", path.dirname(transformers)],
    ["/onnxruntime/", path.dirname(onnxruntime)],
    ["/", here],
  ];
}

/** The file at an address, or null if the address leads out of its directory. */
function locate(served, address) {
  const [prefix, directory] = served.find(([start]) => address.startsWith(start));
  const file = path.join(directory, address.slice(prefix.length) || "index.html");
  return file.startsWith(directory + path.sep) ? file : null;
}

async function respond(served, request, response) {
  let file, found;
  try {
    file = locate(served, decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    found = file && (await stat(file));
  } catch {
    // Not an address, or no such file.
  }
  if (!["GET", "HEAD"].includes(request.method) || !found?.isFile()) {
    response.writeHead(404, HEADERS).end("not found\n");
    return;
  }
  const type = TYPES[path.extname(file)] ?? "application/octet-stream";
  response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
  if (request.method === "HEAD") response.end();
  else createReadStream(file).on("error", () => response.destroy()).pipe(response);
}

function end(message, code) {
  console.error(message);
  process.exit(code);
}

function readArguments() {
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: { port: { type: "string", default: "8000" } },
    });
    if (positionals.length !== 1) throw new Error("give one bundle");
    if (!/^\d{1,5}$/.test(values.port)) throw new Error("--port must be a number");
    return [positionals[0], Number(values.port)];
  } catch (error) {
    return end(`usage: node server.js [--port N] BUNDLE\n${error.message}`, 2);
  }
}

const [bundle, port] = readArguments();
let served;
try {
  served = directories(bundle);
} catch (error) {
  if (error.code !== "MODULE_NOT_FOUND") throw error;
  end("error: transformers.js is not installed: npm ci --prefix examples", 1);
}
// For this machine alone.
createServer((request, response) => respond(served, request, response))
  .on("error", (error) => end(`error: ${error.message}`, 1))
  .listen(port, "127.0.0.1", function () {
    console.log(`http://localhost:${this.address().port}/`);
  });
