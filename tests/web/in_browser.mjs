// A headless browser on a page of a local server: jobs by onnxruntime-web, or clicks.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(`${process.env.LORA_FX_WEB}/`);
const { chromium } = require("playwright-core");
const { url, profile, jobs, clicks, sizes } = JSON.parse(readFileSync(0, "utf8"));
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];
const executablePath = process.env.LORA_FX_CHROMIUM;
const browser = await chromium.launchPersistentContext(profile, { executablePath, args });
try {
  const page = await browser.newPage();
  const told = [];
  page.on("pageerror", (error) => told.push(error.message));
  page.on("console", (message) => told.push(`${message.type()}: ${message.text()}`));
  page.on("requestfailed", (request) => told.push(`failed: ${request.url()}`));
  await page.goto(url);
  const found = jobs === undefined ? await clicked(page) : await page.evaluate(ran, jobs);
  console.log(JSON.stringify({ found, told }));
} finally {
  await browser.close();
}

async function ran(jobs) {
  const ort = await import("/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
  const { runAll } = await import("/tests/web/jobs.mjs");
  return runAll(ort, async (path) => (await fetch(path)).arrayBuffer(), jobs);
}

/** What the page shows of texts after each click, and how much wider than its window it is. */
async function clicked(page) {
  await page.waitForSelector("#ranking li");
  const found = [];
  for (const [query, name] of clicks) {
    await page.fill("#query", query);
    await page.evaluate(() => document.getElementById("ranking").replaceChildren());
    await page.getByRole("button", { name, exact: true }).click();
    await page.waitForSelector(`#ranking[data-adapter="${name}"] li`);
    const rows = await page.$$eval("#ranking li", (every) => every.map((row) => ({
      text: row.dataset.text, score: Number(row.dataset.score), shown: row.innerText,
    })));
    found.push({ rows, pressed: await page.locator("[aria-pressed=true]").allInnerTexts() });
  }
  const wider = [];
  for (const width of sizes) {
    await page.setViewportSize({ width, height: 800 });
    wider.push(await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth));
  }
  return { found, wider };
}
