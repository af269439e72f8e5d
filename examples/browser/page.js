// The page: a conversation, and what the worker says of its progress.
//
// The address may name a precision and a device: ?dtype=q4&device=webgpu.

const element = (id) => document.getElementById(id);
const [log, form, prompt, send, stop] = ["log", "form", "prompt", "send", "stop"].map(element);
const asked = new URLSearchParams(location.search);
const messages = [];
let chat = false;
let answer = null;

const worker = new Worker("worker.js", { type: "module" });
worker.onmessage = ({ data: { type, ...message } }) => handlers[type](message);
worker.onerror = (event) => {
  event.preventDefault();
  handlers.error({ message: event.message || "The worker could not be started." });
};

const handlers = {
  progress({ loaded, total }) {
    element("progress").value = loaded / total;
    element("loaded").textContent = `${megabytes(loaded)} of ${megabytes(total)} MB`;
  },

  ready({ name, dtype, device, threads, ...model }) {
    chat = model.chat;
    element("loading").hidden = true;
    const where = device === "webgpu" ? "WebGPU" : `WebAssembly, ${count(threads, "thread")}`;
    element("model").textContent = `${name} · ${dtype} · ${where}`;
    element("hint").textContent = chat
      ? "Ask something. Everything stays on this machine."
      : "This model continues a text. Begin one, and it goes on. " +
        "Everything stays on this machine.";
    send.disabled = false;
    prompt.focus();
  },

  text({ text }) {
    answer.textContent += text;
    log.scrollTop = log.scrollHeight;
  },

  done({ text, tokens, tokensPerSecond, firstTokenSeconds }) {
    messages.push({ role: "assistant", content: text });
    const speed = Number.isFinite(tokensPerSecond) ? `${tokensPerSecond.toFixed(1)} tokens/s, ` : "";
    element("speed").textContent =
      `${count(tokens, "token")}, ${speed}first in ${firstTokenSeconds.toFixed(2)} s`;
    finish();
  },

  error({ message }) {
    element("error").textContent = message[0].toUpperCase() + message.slice(1);
    element("error").hidden = false;
    element("loading").hidden = true;
    if (answer) {
      answer.remove();
      prompt.value = messages.pop().content;
      finish();
    } else {
      element("model").textContent = "No model";
    }
  },
};

function finish() {
  answer.removeAttribute("aria-busy");
  answer = null;
  generating(false);
  prompt.focus();
}

/** Between the two, there is either something to send or something to stop. */
function generating(yes) {
  send.disabled = yes;
  send.hidden = yes;
  stop.hidden = !yes;
}

function show(role, text) {
  const bubble = document.createElement("p");
  bubble.className = role;
  bubble.textContent = text;
  log.append(bubble);
  log.scrollTop = log.scrollHeight;
  return bubble;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (send.disabled) return;
  element("error").hidden = true;
  element("hint").hidden = true;
  const content = prompt.value;
  messages.push({ role: "user", content });
  show("user", content);
  // A model without a template continues the text itself, so its answer begins where that ends.
  answer = show("assistant", "");
  answer.setAttribute("aria-busy", "true");
  prompt.value = "";
  generating(true);
  worker.postMessage({
    type: "generate",
    messages,
    temperature: element("temperature").valueAsNumber,
    maxNewTokens: element("max-new-tokens").valueAsNumber,
  });
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

stop.addEventListener("click", () => worker.postMessage({ type: "stop" }));

worker.postMessage({
  type: "load",
  dtype: asked.get("dtype") ?? undefined,
  device: asked.get("device") ?? "wasm",
});
