// Line charts in SVG that can be read by pointer and by keyboard. Lines of several runs share a chart; a run has a dash of its own.
const WIDTH = 400, HEIGHT = 200, LEFT = 50, RIGHT = 8, TOP = 8, BOTTOM = 22;
export const DASHES = ["", "6 4", "2 3", "9 3 2 3"];

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) key === "class" ? made.className = value : made.setAttribute(key, value);
  made.append(...children);  // strings become text, never markup
  return made;
}

export function drawn(name, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("-", "−").replace("+", "");
  return (size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)))).replace("-", "−");
}

// The median of 5 neighbours, or of a 25th of a long curve: a single outlier leaves it as it is.
function smoothed(values) {
  const half = Math.max(2, Math.floor(values.length / 50));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).sort((a, b) => a - b);
    const middle = near.length >> 1;
    return near.length % 2 ? near[middle] : (near[middle - 1] + near[middle]) / 2;
  });
}

export class Chart {
  // onStep(step, chart): the reader is at a step (null: nowhere). onOpen(step): wants its documents.
  constructor(title, onStep, onOpen) {
    this.title = title; this.lines = []; this.at = null;
    this.svg = drawn("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0"});
    this.legend = element("div", {class: "legend"});
    this.element = element("div", {class: "chart"}, element("h4", {}, title), this.svg, this.legend);
    const step = event => {
      const box = this.svg.getBoundingClientRect(), share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
      return this.nearest(this.low + share * (this.high - this.low));
    };
    this.svg.addEventListener("pointermove", event => onStep(step(event)));
    this.svg.addEventListener("pointerleave", () => onStep(null));
    this.svg.addEventListener("click", event => onOpen(step(event)));
    this.svg.addEventListener("blur", () => onStep(null));
    this.svg.addEventListener("keydown", event => {
      const steps = this.steps(), here = this.at === null ? steps.length - 1 : steps.indexOf(this.nearest(this.at));
      const to = {ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: steps.length - 1}[event.key];
      if (to !== undefined) { event.preventDefault(); onStep(steps[Math.min(Math.max(to, 0), steps.length - 1)]); }
      else if (event.key === "Enter" && this.at !== null) onOpen(this.at);
    });
  }

  steps() { return [...new Set(this.lines.flatMap(line => line.steps))].sort((a, b) => a - b); }

  nearest(step) {
    let found = null;
    for (const line of this.lines) for (const one of line.steps) if (found === null || Math.abs(one - step) < Math.abs(found - step)) found = one;
    return found;
  }

  // lines: {label, run, colour, dash, steps, values}; values are null where they are not finite
  update(lines, smooth) {
    this.lines = lines.map(line => {
      const kept = line.steps.map((step, i) => [step, line.values[i]]).filter(([, value]) => value !== null);
      return {...line, steps: kept.map(([step]) => step), values: kept.map(([, value]) => value)};
    }).filter(line => line.steps.length);
    this.element.hidden = !this.lines.length;
    if (this.lines.length) this.draw(smooth);
  }

  draw(smooth) {
    const curves = this.lines.map(line => smooth ? smoothed(line.values) : line.values);
    const typical = curves.flat(), raw = this.lines.flatMap(line => line.values);
    const least = typical.reduce((a, b) => Math.min(a, b)), most = typical.reduce((a, b) => Math.max(a, b));
    const slack = (most - least) / 2 || Math.abs(most) * 0.05 || 0.05;
    let bottom = Math.max(least - slack, raw.reduce((a, b) => Math.min(a, b))), top = Math.min(most + slack, raw.reduce((a, b) => Math.max(a, b)));
    const pad = (top - bottom) * 0.08 || slack;
    bottom = bottom < 0 || bottom > pad ? bottom - pad : 0; top += pad;
    this.low = Math.min(...this.lines.map(line => line.steps[0])); this.high = Math.max(...this.lines.map(line => line.steps.at(-1)));
    this.x = step => LEFT + (WIDTH - LEFT - RIGHT) * (step - this.low) / ((this.high - this.low) || 1);
    this.y = value => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (Math.min(Math.max(value, bottom), top) - bottom) / (top - bottom));
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const value = bottom + (top - bottom) * share, y = this.y(value);
      parts.push(drawn("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y, stroke: "var(--line)"}));
      parts.push(drawn("text", {x: LEFT - 6, y: y + 4, "text-anchor": "end"}, short(value)));
    }
    parts.push(drawn("text", {x: LEFT, y: HEIGHT - 5}, String(this.low)));
    parts.push(drawn("text", {x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end"}, `step ${this.high}`));
    this.lines.forEach((line, i) => {
      const path = values => line.steps.map((step, n) => `${this.x(step).toFixed(1)},${this.y(values[n]).toFixed(1)}`).join(" ");
      const style = {fill: "none", stroke: line.colour, "stroke-linejoin": "round", "stroke-dasharray": line.dash};
      if (smooth) parts.push(drawn("polyline", {...style, points: path(line.values), "stroke-opacity": 0.28, "stroke-dasharray": ""}));
      parts.push(drawn("polyline", {...style, points: path(curves[i]), "stroke-width": 2}));
      if (line.steps.length === 1) parts.push(drawn("circle", {cx: this.x(line.steps[0]), cy: this.y(line.values[0]), r: 3, fill: line.colour}));
    });
    this.cursor = drawn("g", {"pointer-events": "none"});
    this.svg.replaceChildren(...parts, this.cursor);
    this.read(this.at);
  }

  // Shows the values at a step; at the end where step is null.
  read(step) {
    this.at = step;
    if (!this.lines.length) return;
    const shown = this.lines.map(line => {
      let n = line.steps.length - 1;
      if (step !== null) while (n > 0 && line.steps[n] > step) n--;
      return {line, step: line.steps[n], value: line.values[n]};
    });
    this.cursor.replaceChildren();
    if (step !== null && step >= this.low && step <= this.high) {
      const x = this.x(step);
      this.cursor.append(drawn("line", {x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--soft)", "stroke-dasharray": "2 3"}));
      this.cursor.append(drawn("text", {x: Math.min(Math.max(x, LEFT + 14), WIDTH - 80), y: HEIGHT - 5, "text-anchor": "middle"}, String(step)));
      for (const {line, step: at, value} of shown) this.cursor.append(drawn("circle", {cx: this.x(at), cy: this.y(value), r: 3.5, fill: line.colour}));
    }
    const labels = new Map();  // the values of several runs stand behind one label, in the order of the runs
    for (const {line, value} of shown) labels.set(line.label, [...(labels.get(line.label) ?? []), {line, value}]);
    this.legend.replaceChildren(...[...labels].map(([label, found]) => {
      const dot = element("i"); dot.style.background = found[0].line.colour;
      return element("span", {title: found.map(({line, value}) => `${line.run}: ${short(value)}`).join("\n")}, dot, `${label} `, element("b", {}, found.map(({value}) => short(value)).join(" / ")));
    }));
    const told = shown.map(({line, value}) => `${line.label}${labels.get(line.label).length > 1 ? ` of ${line.run}` : ""} ${short(value)}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, step ${step ?? this.high}: ${told}`);
  }
}
