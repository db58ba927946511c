"use strict";
// Everything that a person, a file or a model wrote is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const FACTS = JSON.parse($("facts").textContent);
const KEPT = "diptych.documents", KEY = "diptych.key";
const LONG = 240;  // characters of a text that takes the whole width
let pictures = [];  // data addresses that go before the prompt
let running = null;  // AbortController of what is being written
let kept = [];  // documents of this session, the newest first

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
function say(text) { $("said").textContent = text; }
function complain(text) { $("problem").textContent = text; $("problem").hidden = !text; }
function number(id) { const value = $(id).value.trim(); return value === "" ? undefined : Number(value); }

// --- what is asked ---
function setUp() {
  for (const model of FACTS.models) {
    $("model").append(new Option(model.name, model.name));
    $("compare").append(new Option(model.name, model.name));
  }
  $("compare").prepend(new Option("nothing", "", true, true));
  $("other").hidden = FACTS.models.length < 2;
  showDefaults();
  try { $("key").value = sessionStorage.getItem(KEY) || ""; kept = JSON.parse(sessionStorage.getItem(KEPT) || "[]"); } catch { kept = []; }
  for (const entry of [...kept].reverse()) show(entry);
  $("model").addEventListener("change", showDefaults);
  $("form").addEventListener("change", () => { $("max_images").disabled = $("form").value !== "free"; });
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("file").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("ask").requestSubmit(); }
    if (event.key === "Escape") running?.abort();
  });
  document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); add(event.clipboardData.files); } });
  document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
  document.addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); add(event.dataTransfer.files); });
}
function showDefaults() {
  const model = FACTS.models.find((one) => one.name === $("model").value);
  $("guidance").placeholder = model.guidance === null ? "own" : `own: ${model.guidance}`;
  $("temperature").placeholder = `own: ${model.temperature}`;
  $("max_images").placeholder = `own: ${model.max_images}`;
  $("examples").replaceChildren(...model.examples.map((text) => {
    const button = make("button", { type: "button", textContent: text, title: text });
    button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    return button;
  }));
}
async function add(files) {
  for (const file of [...files]) {  // the list is emptied behind us
    if (!file.type.startsWith("image/")) { complain(`${file.name} is no picture`); continue; }
    pictures.push(await new Promise((done, fail) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result); reader.onerror = () => fail(reader.error);
      reader.readAsDataURL(file);
    }));
  }
  showPictures();
}
function showPictures() {
  $("pictures").replaceChildren(...pictures.map((url, index) => {
    const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove picture ${index + 1}` });
    remove.addEventListener("click", () => { pictures.splice(index, 1); showPictures(); $("file").focus(); });
    const thumb = make("div", { className: "thumb" }, make("img", { src: url, alt: `Picture ${index + 1}` }), remove);
    thumb.setAttribute("role", "listitem");
    return thumb;
  }));
}

// --- writing ---
async function write() {
  if (running || !$("ask").reportValidity()) return;
  complain("");
  const models = [$("model").value, $("compare").value].filter((name, index) => index === 0 || name);
  const seed = number("seed") ?? Math.floor(Math.random() * 2 ** 31);
  const form = $("form").value;
  const settings = { form, max_images: form === "free" ? number("max_images") : undefined, guidance_scale: number("guidance") };
  const entry = {
    prompt: $("prompt").value, pictures: [...pictures], seed, temperature: number("temperature"), settings,
    answers: models.map((model) => ({ model, parts: [], end: "", seconds: 0 })),
  };
  running = new AbortController();
  $("write").disabled = true; $("stop").disabled = false;
  const card = show(entry);
  say("Writing.");
  const ends = await Promise.allSettled(entry.answers.map((answer, index) => stream(entry, answer, card.columns[index], running.signal)));
  running = null;
  $("write").disabled = false; $("stop").disabled = true;
  const failed = ends.find((end) => end.status === "rejected");
  if (failed) complain(failed.reason.message);
  card.finish();
  if (entry.answers.some((answer) => answer.parts.length)) keep(entry);
  const count = (kind) => entry.answers.map((answer) => answer.parts.filter((part) => part.type === kind).length).join(" and ");
  say(failed ? `It ended with an error: ${failed.reason.message}` : `Finished: ${count("text")} texts, ${count("image")} pictures.`);
}
async function stream(entry, answer, column, signal) {
  const began = performance.now();
  column.element.classList.add("writing"); column.element.setAttribute("aria-busy", "true");
  try {
    for await (const event of ask(entry, answer.model, signal)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      if (!choice) continue;
      if (choice.delta.content) column.words(choice.delta.content);
      for (const image of choice.delta.images ?? []) column.picture(image.image_url.url);
      if (choice.finish_reason) answer.end = choice.finish_reason;
    }
    if (!answer.end) throw new Error("the connection ended before the document did");
  } catch (error) {
    answer.end = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.end === "failed") throw error;
  } finally {
    answer.seconds = (performance.now() - began) / 1000;
    column.element.classList.remove("writing"); column.element.removeAttribute("aria-busy");
    column.ended();
  }
}
async function* ask(entry, model, signal) {
  const content = [...entry.pictures.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: entry.prompt }];
  const body = { model, messages: [{ role: "user", content }], seed: entry.seed, temperature: entry.temperature, stream: true, diptych: entry.settings };
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) { headers.Authorization = `Bearer ${$("key").value}`; try { sessionStorage.setItem(KEY, $("key").value); } catch { /* kept in the field */ } }
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.status === 401) { $("access").hidden = false; $("key").focus(); }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered with status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

// --- showing ---
function show(entry) {
  $("empty").hidden = true;
  const thumbs = make("div", { className: "thumbs" }, ...entry.pictures.map((src, i) => make("img", { src, alt: `Picture ${i + 1} of the prompt` })));
  const asked = make("div", { className: "asked" }, thumbs, make("h2", { textContent: entry.prompt }));
  const columns = entry.answers.map((answer) => new Column(entry, answer));
  const row = make("div", { className: "columns" }, ...columns.map((column) => column.element));
  row.style.setProperty("--count", columns.length);
  const foot = make("div", { className: "foot" });
  const card = make("article", { className: "card" }, asked, row, foot);
  const finish = () => {
    const button = (text, about, act) => { const made = make("button", { type: "button", textContent: text, ariaLabel: about }); made.addEventListener("click", act); return made; };
    foot.replaceChildren(
      button("Save as a page", `Save the document about ${entry.prompt.slice(0, 60)} as a page`, () => save(entry)),
      button("Ask again", "Put the prompt and the settings back into the form", () => again(entry)),
      button("Remove", "Remove this document", () => { kept = kept.filter((one) => one !== entry); store(); card.remove(); $("empty").hidden = kept.length > 0; $("documents").focus(); }),
    );
  };
  if (entry.answers.some((answer) => answer.end)) finish();
  $("documents").prepend(card);
  return { columns, finish };
}
class Column {
  constructor(entry, answer) {
    this.entry = entry; this.answer = answer;
    this.head = make("h3", {}, make("span", { textContent: answer.model }));
    this.panels = make("div", { className: "panels" });
    this.element = make("section", { className: "answer", ariaLabel: `Answer of ${answer.model}` }, this.head, this.panels);
    const parts = answer.parts;
    answer.parts = [];
    for (const part of parts) if (part.type === "text") this.words(part.text); else this.picture(part.url);
    if (answer.end) this.ended();
  }
  words(text) {
    const last = this.answer.parts.at(-1);
    if (last?.type === "text") { last.text += text; } else { this.answer.parts.push({ type: "text", text }); this.panel = null; }
    const part = this.answer.parts.at(-1);
    if (!this.panel) { this.text = make("p"); this.panel = make("figure", { className: "panel" }, this.text); this.panels.append(this.panel); }
    this.text.textContent = part.text;
    this.panel.classList.toggle("wide", part.text.length > LONG);
  }
  picture(url) {
    if (!url.startsWith("data:image/")) return;
    const before = this.answer.parts.at(-1);
    const count = this.answer.parts.filter((part) => part.type === "image").length + 1;
    const about = before?.type === "text" ? `Picture ${count}: ${before.text}` : `Picture ${count}`;
    if (before?.type !== "text") { this.panel = make("figure", { className: "panel" }); this.panels.append(this.panel); }
    this.answer.parts.push({ type: "image", url });
    this.panel.append(make("img", { src: url, alt: about }));
    if (running) say(`${this.entry.answers.length > 1 ? `${this.answer.model}: ` : ""}${about} is drawn.`);
  }
  ended() {
    const ends = { length: "cut at its length", stopped: "stopped", failed: "failed" };
    const facts = [`seed ${this.entry.seed}`, `${this.answer.seconds.toFixed(1)} s`, ends[this.answer.end]].filter(Boolean);
    this.head.replaceChildren(make("span", { textContent: this.answer.model }), ...facts.map((text) => make("span", { className: "chip", textContent: text })));
    if (!this.answer.parts.length && this.answer.end !== "failed") this.panels.replaceChildren(make("p", { className: "note", textContent: "The answer is empty." }));
  }
}

// --- keeping ---
function keep(entry) { kept.unshift(entry); store(); }
function store() {
  let some = [...kept];
  while (true) {
    try { sessionStorage.setItem(KEPT, JSON.stringify(some)); return; } catch { if (!some.length) return; some.pop(); }  // the browser keeps a few megabytes; the oldest go
  }
}
function again(entry) {
  $("prompt").value = entry.prompt; pictures = [...entry.pictures]; showPictures();
  const has = (name) => FACTS.models.some((model) => model.name === name);
  if (has(entry.answers[0].model)) $("model").value = entry.answers[0].model;
  $("compare").value = entry.answers[1] && has(entry.answers[1].model) ? entry.answers[1].model : "";
  $("form").value = entry.settings.form ?? "free"; $("form").dispatchEvent(new Event("change"));
  for (const [id, value] of [["seed", entry.seed], ["temperature", entry.temperature], ["guidance", entry.settings.guidance_scale], ["max_images", entry.settings.max_images]]) $(id).value = value ?? "";
  showDefaults();
  $("prompt").focus();
}
function save(entry) {
  const page = document.implementation.createHTMLDocument(entry.prompt.slice(0, 80) || "Document");
  page.documentElement.lang = "en";
  const policy = page.createElement("meta");
  policy.httpEquiv = "Content-Security-Policy";
  policy.content = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";
  const charset = page.createElement("meta");
  charset.setAttribute("charset", "utf-8");
  const view = Object.assign(page.createElement("meta"), { name: "viewport", content: "width=device-width, initial-scale=1" });
  const scheme = Object.assign(page.createElement("meta"), { name: "color-scheme", content: "light dark" });
  const style = page.createElement("style");
  style.textContent = document.querySelector("style").textContent;
  page.head.prepend(charset, policy, view, scheme);
  page.head.append(style);
  const shown = show(entry).columns[0].element.closest("article");  // built anew, then moved
  shown.querySelector(".foot").remove();
  const main = Object.assign(page.createElement("main"), { className: "saved" });
  main.append(page.adoptNode(shown));
  page.body.append(main);
  const url = URL.createObjectURL(new Blob(["<!doctype html>\n", page.documentElement.outerHTML, "\n"], { type: "text/html" }));
  const link = make("a", { href: url, download: `${(entry.prompt.toLowerCase().match(/[a-z0-9]+/g) ?? ["document"]).slice(0, 8).join("-")}.html` });
  document.body.append(link); link.click(); link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say("Saved.");
}
setUp();
