// Asks the server what is new every two seconds, while the page is looked at.
import {Chart, DASHES, drawn, element, short} from "./charts.js";
import {groupCard} from "./groups.js";

const EVERY = 2000, MOST_POINTS = 1500, MOST_RUNS = DASHES.length;
const $ = id => document.getElementById(id);
const both = name => [["text", "var(--text-colour)", `${name}/text`], ["picture", "var(--image-colour)", `${name}/image`]];
const one = (name, label = name) => [[label, "var(--c0)", name]];
// Title, and lines; or the beginning and the end of names, for one line each
const CHARTS = [
  ["Training reward", one("reward", "weighted sum")],
  ["Rewards of sampled documents", ["rewards/", "/mean"]],
  ["Rewards of held-out prompts, greedy", ["eval/rewards/", "/mean"]],
  ["Held-out loss (nats per choice)", both("eval/loss")],
  ["Entropy per choice (nats)", both("entropy")],
  ["KL to the reference per choice", both("kl")],
  ["Groups without spread", one("frac_reward_zero_std", "share")],
  ["Largest |replayed − sampled| log-probability", [["text", "var(--text-colour)", "parity/text_max"], ["picture", "var(--image-colour)", "parity/image_max"]]],
  ["Missing reward values", ["rewards/", "/missing"]],
  ["Clipped choices", both("clip_ratio/region_mean")],
  ["Loss", [["policy", "var(--c0)", "loss"], ...both("loss")]],
  ["Loss on examples of existing skills", both("ptx/loss")],
  ["Length of answers (tokens)", [["mean", "var(--c0)", "completions/mean_length"], ["longest", "var(--c1)", "completions/max_length"]]],
  ["Pictures per document", one("completions/mean_images", "mean")],
  ["Cut off answers", one("completions/clipped_ratio", "share")],
  ["Gradient norm", one("grad_norm")],
  ["Learning rate", one("lr")],
  ["Seconds per step", [["whole step", "var(--c0)", "step_time"], ["sampling", "var(--c1)", "seconds/rollout"]]],
];
const state = {runs: [], shown: [], step: null, saved: "", series: new Map(), charts: new Map(), asked: 0, more: null, at: null};

async function ask(path, values = {}) {
  const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null && value !== "" && value !== undefined));
  const answer = await fetch(`${path}?${query}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}
const runOf = id => state.runs.find(run => run.id === id);
const focused = () => runOf(state.shown[0]);

// --- what is shown ---
function show(id, together = false) {
  const before = state.shown[0];
  if (!together) state.shown = [id, ...state.shown.slice(1).filter(other => other !== id)];
  else state.shown = state.shown.includes(id) ? state.shown.filter(other => other !== id) : [...state.shown, id].slice(0, MOST_RUNS);
  if (!state.shown.length) state.shown = [id];
  if (state.shown[0] !== before) { state.step = null; $("newest").checked = true; state.saved = ""; fillRewards(); }
  remember(); render(); update();
}
function remember() {
  const words = new URLSearchParams([["run", state.shown[0]], ...state.shown.slice(1).map(id => ["with", id]), ...($("newest").checked || state.step === null ? [] : [["step", state.step]])]);
  history.replaceState(null, "", `#${words}`);
}
function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.shown = [words.get("run"), ...words.getAll("with")].filter(id => id !== null && runOf(id)).slice(0, MOST_RUNS);
  if (words.has("step") && state.shown.length) { state.step = Number(words.get("step")); $("newest").checked = false; }
}

// --- asking ---
async function poll() {
  try {
    if (!document.hidden) await update();
    $("connection").textContent = ""; $("connection").className = "";
  } catch {
    $("connection").textContent = "The server does not answer; trying again"; $("connection").className = "lost";
  }
  setTimeout(poll, EVERY);
}
async function update() {
  const isFirst = !state.runs.length;
  state.runs = await ask("api/runs");
  if (isFirst && state.runs.length) { recall(); fillRewards(); }
  state.shown = state.shown.filter(id => runOf(id));
  if (!state.shown.length && state.runs.length) {
    const order = {training: 0, quiet: 1, finished: 2};
    state.shown = [[...state.runs].sort((a, b) => order[a.state] - order[b.state] || a.age_seconds - b.age_seconds)[0].id];
    fillRewards();
  }
  await Promise.all(state.shown.map(fetchSeries));
  render();
  await fetchDocuments();
}
async function fetchSeries(id) {
  const run = runOf(id), known = state.series.get(id);
  if (known && known.generation === run.generation && known.lines === run.lines) return;
  const long = known && Object.values(known.series).some(([steps]) => steps.length > MOST_POINTS);
  const found = await ask("api/series", {run: id, generation: known && !long ? known.generation : "", step: known && !long ? known.step : 0});
  const series = found.whole ? {} : known.series;
  for (const [name, [steps, values]] of Object.entries(found.series)) {
    const [before, old] = series[name] ?? [[], []];
    series[name] = [before.concat(steps), old.concat(values)];
  }
  state.series.set(id, {generation: found.generation, step: found.step, lines: run.lines, series});
}

// --- drawing ---
function duration(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}
const worst = run => run.alerts.filter(alert => alert.level === "alert").length;

function render() {
  const run = focused();
  $("empty").hidden = Boolean(run); $("content").hidden = !run;
  renderRuns();
  if (!run) return;
  document.title = `${worst(run) ? `(${worst(run)}) ` : ""}${run.id} – Diptych runs`;
  $("name").textContent = run.id; $("state").textContent = run.state === "quiet" ? `quiet for ${duration(run.age_seconds)}` : run.state; $("state").className = `state ${run.state}`;
  const facts = [["kind", run.kind === "grpo" ? "GRPO" : "warm-up"], ["step", run.max_steps ? `${run.step} / ${run.max_steps}` : run.step]];
  if (run.reward !== null) facts.push(["reward", short(run.reward)]);
  if (run.step_seconds) facts.push(["a step", `${short(run.step_seconds)} s`]);
  if (run.step_seconds && run.state === "training") facts.push(["left", duration(run.step_seconds * (run.max_steps - run.step))]);
  facts.push(["last line", `${duration(run.age_seconds)} ago`]);
  $("facts").replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  renderAlerts(run);
  $("key").replaceChildren(...(state.shown.length < 2 ? [] : state.shown.map((id, n) => {
    const line = drawn("svg", {viewBox: "0 0 30 8", "aria-hidden": "true"});
    line.append(drawn("line", {x1: 0, x2: 30, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": DASHES[n]}));
    return element("span", {}, line, id);
  })));
  renderCharts();
}
function renderRuns() {
  const list = $("runs"), active = document.activeElement, kept = active && list.contains(active) ? [active.dataset.run, active.tagName] : null;
  list.replaceChildren(...state.runs.map(run => {
    const index = state.shown.indexOf(run.id);
    const button = element("button", {type: "button", "data-run": run.id, ...(index === 0 ? {"aria-current": "true"} : {})}, run.id);
    button.addEventListener("click", () => show(run.id));
    const box = element("input", {type: "checkbox", "data-run": run.id});
    box.checked = index >= 0; box.disabled = index === 0 && state.shown.length === 1 || index < 0 && state.shown.length >= MOST_RUNS;
    box.addEventListener("change", () => show(run.id, true));
    const filled = element("i"); filled.style.width = `${run.max_steps ? Math.min(100, 100 * run.step / run.max_steps) : 0}%`;
    const label = element("label", {title: "draw its curves too"}, box, "lay over");
    return element("li", {class: `run${index >= 0 ? " shown" : ""}`}, button, element("div", {class: "bar"}, filled),
      element("div", {class: "line"}, element("span", {}, `${run.step}${run.max_steps ? ` / ${run.max_steps}` : ""}`), element("span", {}, run.state),
        ...(worst(run) ? [element("span", {class: "badge", title: "alerts"}, `${worst(run)} alert${worst(run) > 1 ? "s" : ""}`)] : []), label));
  }));
  if (kept) [...list.querySelectorAll(kept[1])].find(one => one.dataset.run === kept[0])?.focus();
}
function renderAlerts(run) {
  const wanted = JSON.stringify(run.alerts);
  if ($("alerts").dataset.now === wanted) return;
  $("alerts").dataset.now = wanted;
  $("alerts").replaceChildren(...run.alerts.map(alert => {
    const button = element("button", {type: "button"}, "Show curve");
    button.addEventListener("click", () => {
      const charts = [...state.charts.values()].filter(chart => chart.lines.some(line => alert.metrics.includes(line.name)));
      charts.forEach(chart => { chart.element.classList.add("marked"); setTimeout(() => chart.element.classList.remove("marked"), 4000); });
      charts[0]?.element.scrollIntoView({block: "center"});
    });
    return element("div", {class: `alert ${alert.level}`, role: alert.level === "alert" ? "alert" : "note"}, element("span", {class: "sign", "aria-hidden": "true"}, alert.level === "alert" ? "▲" : "●"),
      element("b", {}, alert.title), element("p", {}, alert.text), button);
  }));
}
function linesOf(given, names) {
  if (Array.isArray(given[0])) return given;
  const [begin, end] = given, watching = new Set(focused().rewards.filter(reward => !reward.weight).map(reward => reward.key));
  return names.filter(name => name.startsWith(begin) && name.endsWith(end)).map((name, n) => {
    const key = name.slice(begin.length, name.length - end.length);
    return [watching.has(key) ? `${key} (watches)` : key, `var(--c${n % 6})`, name];
  });
}
function renderCharts() {
  const shown = state.shown.map(id => state.series.get(id)?.series ?? {}), names = [...new Set(shown.flatMap(Object.keys))], drawn = new Set();
  for (const [title, given] of CHARTS) {
    const lines = linesOf(given, names);
    lines.forEach(([, , name]) => drawn.add(name));
    const isQuiet = title === "Missing reward values" && !shown.some(series => lines.some(([, , name]) => series[name]?.[1].some(value => value)));
    draw($("charts"), title, isQuiet ? [] : lines, shown);
  }
  const others = names.filter(name => !drawn.has(name)).sort();
  $("others").hidden = !others.length;
  if ($("others").open) others.forEach(name => draw($("other-charts"), name, [[name, "var(--c0)", name]], shown));
}
function draw(place, title, lines, shown) {
  let chart = state.charts.get(title);
  const all = shown.flatMap((series, n) => lines.filter(([, , name]) => series[name]).map(([label, colour, name]) => ({
    name, label, run: state.shown[n], colour, dash: DASHES[n], steps: series[name][0], values: series[name][1],
  })));
  if (!chart && !all.length) return;
  if (!chart) {
    chart = new Chart(title, step => { state.at = step; state.charts.forEach(other => other.read(step)); }, openNear);
    state.charts.set(title, chart); place.append(chart.element);
  }
  chart.update(all, $("smooth").checked);
}

// --- documents ---
function openNear(step) {
  const saved = focused().saved;
  if (step === null || !saved.length) return;
  choose(saved.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a));
  $("documents-title").scrollIntoView({block: "start"});
}
function choose(step) {
  state.step = step; $("newest").checked = step === focused().saved.at(-1) && $("newest").checked; $("all").checked = false;
  remember(); fetchDocuments();
}
function move(by) {
  const saved = focused()?.saved ?? [], here = saved.indexOf(state.step);
  if (saved.length) { $("newest").checked = false; choose(saved[Math.min(Math.max(here + by, 0), saved.length - 1)]); }
}
function fillRewards() {
  const run = focused(), names = run ? ["reward", ...run.rewards.map(reward => reward.key)] : [], before = $("reward").value;
  $("reward").replaceChildren(element("option", {value: ""}, "any"), ...names.map(name => element("option", {value: name}, name)));
  $("reward").value = names.includes(before) ? before : "";
}
const searching = () => ({text: $("text").value, reward: $("reward").value, low: $("reward").value ? $("low").value : "", high: $("reward").value ? $("high").value : ""});

async function fetchDocuments(older = false) {
  const run = focused();
  if (!run) return;
  const saved = run.saved;
  if ($("newest").checked || !saved.includes(state.step)) state.step = saved.at(-1) ?? null;
  const slider = $("slider"), place = saved.indexOf(state.step);
  slider.max = Math.max(0, saved.length - 1); slider.value = Math.max(0, place); slider.disabled = saved.length < 2;
  slider.setAttribute("aria-valuetext", `step ${state.step}`);
  $("step").textContent = state.step === null ? "none yet" : $("all").checked ? "all steps" : `step ${state.step}`;
  $("earlier").disabled = place <= 0; $("later").disabled = place < 0 || place === saved.length - 1;
  $("low").disabled = $("high").disabled = !$("reward").value;
  const asked = {run: run.id, step: $("all").checked ? "" : state.step, before: older ? state.more : "", ...searching()};
  const wanted = JSON.stringify([asked, $("order").value, $("all").checked ? saved.length : "", run.generation]);
  if (wanted === state.saved && !older) return;
  if (state.step === null) { $("groups").replaceChildren(); $("found").textContent = "No documents are saved yet."; $("more").hidden = true; state.saved = wanted; return; }
  const number = ++state.asked, answer = await ask("api/documents", asked);
  if (number !== state.asked) return;  // another question was asked meanwhile
  state.saved = older ? state.saved : wanted; state.more = answer.more;
  const cards = answer.groups.map(group => groupCard(group, run.rewards, $("order").value));
  older ? $("groups").append(...cards) : $("groups").replaceChildren(...cards);
  const documents = answer.groups.reduce((sum, group) => sum + group.members.filter(member => member.found).length, 0);
  $("found").textContent = `${documents} document${documents === 1 ? "" : "s"} in ${answer.groups.length} group${answer.groups.length === 1 ? "" : "s"}${answer.more === null ? "" : ", and there may be more"}`;
  $("more").hidden = answer.more === null;
}
const failed = error => { console.warn(error.message); };
let typing = 0;
const soon = () => { clearTimeout(typing); typing = setTimeout(() => fetchDocuments().catch(failed), 200); };

// --- hands ---
$("search").addEventListener("submit", event => event.preventDefault());
for (const id of ["text", "low", "high"]) $(id).addEventListener("input", soon);
for (const id of ["reward", "all", "order", "newest"]) $(id).addEventListener("change", () => { remember(); soon(); });
$("slider").addEventListener("input", () => { $("newest").checked = false; choose(focused().saved[Number($("slider").value)]); });
$("earlier").addEventListener("click", () => move(-1));
$("later").addEventListener("click", () => move(1));
$("more").addEventListener("click", () => fetchDocuments(true).catch(failed));
$("smooth").addEventListener("change", renderCharts);
$("others").addEventListener("toggle", renderCharts);
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const runs = state.runs.map(run => run.id), here = runs.indexOf(state.shown[0]);
  if (event.key === "[") move(-1);
  else if (event.key === "]") move(1);
  else if (event.key === "/") { event.preventDefault(); $("text").focus(); }
  else if (event.key === "j" && here < runs.length - 1) show(runs[here + 1]);
  else if (event.key === "k" && here > 0) show(runs[here - 1]);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) update().catch(failed); });
poll();
