// Uses the page of examples/browser in a headless Chromium, as its visitors do.
//
//   node browse.js CHROMIUM SCENARIO
//
// The scenario is JSON: the page's url, and optionally Chromium's flags, the prompts, maxNewTokens,
// whether to stop each answer, the build of ONNX Runtime to put in place of the page's own, and the
// name of a picture to take. Prints, as JSON, what was seen.

import { chromium } from "playwright-core";

const [executablePath, text] = process.argv.slice(2);
const scenario = { flags: ["--disable-gpu"], prompts: [], maxNewTokens: 24, ...JSON.parse(text) };

const QUIET = [
  "--no-sandbox",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** Notes in the page each value that the progress bar has, and whether it can be seen then. */
function watchProgress() {
  window.progress = [];
  new MutationObserver(() => {
    const bar = document.querySelector("progress[value]");
    if (bar) window.progress.push({ value: bar.value, visible: bar.checkVisibility() });
  }).observe(document, { subtree: true, childList: true, attributes: true });
}

const seen = { requests: [], failures: [], answers: [], speeds: [] };
const browser = await chromium.launch({ executablePath, args: [...QUIET, ...scenario.flags] });
try {
  const page = await browser.newPage({ viewport: { width: 900, height: 640 } });
  page.setDefaultTimeout(120_000);
  page.on("pageerror", (error) => seen.failures.push(error.message));
  page.on("response", (response) => seen.requests.push(response.url()));
  if (scenario.build) {
    await page.route(/ort-wasm-simd-threaded\.(mjs|wasm)$/, (route) =>
      route.continue({ url: route.request().url().replace("threaded", `threaded.${scenario.build}`) }),
    );
  }
  await page.addInitScript(watchProgress);
  await page.goto(scenario.url);
  const ready = page.locator("#send:enabled");
  const error = page.locator("#error:visible");
  await ready.or(error).waitFor();
  if (await error.isVisible()) scenario.prompts = [];
  for (const prompt of scenario.prompts) {
    await page.getByLabel("Your text").fill(prompt);
    await page.getByLabel("At most").fill(String(scenario.maxNewTokens));
    await page.getByRole("button", { name: "Send" }).click();
    if (scenario.stop) {
      await page.locator(".assistant:not(:empty)").last().waitFor();
      await page.getByRole("button", { name: "Stop" }).click();
    }
    await ready.waitFor();
    seen.speeds.push(await page.locator("#speed").textContent());
  }
  seen.answers = await page.locator(".assistant").allTextContents();
  seen.model = await page.locator("#model").textContent();
  seen.hint = await page.locator("#hint").textContent();
  seen.error = (await error.isVisible()) ? await error.textContent() : null;
  seen.progress = await page.evaluate(() => window.progress);
  if (scenario.picture) await page.screenshot({ path: scenario.picture });
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
