// Groups of documents: what each reward said of each member, which member is better than the others and by what, and the advantage of each step.
import {element, short} from "./charts.js";

const STRONG = 2;  // an advantage whose colour is full

function signed(value) { return (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2); }

function tint(score) {  // of -1 (bad) to 1 (good)
  const strength = Math.min(Math.abs(score), 1);
  return `rgba(var(--${score < 0 ? "bad" : "good"}-rgb), ${(strength * 0.42).toFixed(3)})`;
}

function blocks(list) {
  return list.map(block => block.type === "image" ? element("img", {src: block.image, alt: "a picture of the prompt"}) : element("span", {}, block.text));
}

function mean(values) { return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null; }

// Advantages of a member's texts, or of its pictures
function advantagesOf(member, type) {
  return member.advantages.filter((value, n) => value !== null && member.answer[n] && member.answer[n].type === type);
}

function row(label, values, options = {}) {
  const known = values.filter(value => value !== null && value !== undefined);
  const middle = mean(known), spread = Math.sqrt(mean(known.map(value => (value - middle) ** 2)) ?? 0);
  const cells = values.map(value => {
    const cell = element("td", value === null ? {class: "missing"} : {}, value === undefined ? "–" : value === null ? "missing" : options.signed ? signed(value) : short(value));
    const score = value === null || value === undefined ? 0 : options.signed ? value / STRONG : spread > 1e-9 ? (value - middle) / spread / 2 : 0;
    if (score && options.shade !== false) cell.style.background = tint(score);
    return cell;
  });
  return element("tr", options.sum ? {class: "sum"} : {}, element("th", {scope: "row"}, label, ...(options.note ? [element("small", {}, ` ${options.note}`)] : [])), ...cells);
}

// What a reward said of a member: its mean; null: missing; undefined: nothing
function saidBy(member, name) {
  if (name in member.means) return member.means[name];
  return name in member.document || member.steps.some(step => name in step) ? null : undefined;
}

function scores(members, rewards, names, id) {
  const best = bestOf(members);
  const head = element("tr", {}, element("th", {scope: "row"}, ""), ...members.map(member => element("th", {scope: "col"},
    element("a", {href: `#${id}-${member.number}`}, `#${member.number + 1}`, ...(member === best ? [element("span", {class: "star", title: "the best of the group"}, " ★")] : [])))));
  const body = [];
  if (members.some(member => member.reward !== null)) body.push(row("reward", members.map(member => member.reward), {sum: true, note: "weighted sum"}));
  for (const name of names) {
    const reward = rewards.find(one => one.key === name);
    const note = !reward ? "" : reward.weight ? `× ${reward.weight}${reward.modality === "both" ? "" : `, trains ${reward.modality === "image" ? "pictures" : "texts"}`}` : "watches";
    const line = row(name, members.map(member => saidBy(member, name)), {note});
    if (reward && reward.about) line.firstChild.title = reward.about;
    body.push(line);
  }
  for (const [type, label] of [["text", "texts"], ["image", "pictures"]]) {
    const values = members.map(member => mean(advantagesOf(member, type)) ?? undefined);
    if (values.some(value => value !== undefined)) body.push(row(`advantage of ${label}`, values, {signed: true, note: "mean of its steps"}));
  }
  if (!body.length) return [];
  return [element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": "what each reward said"}, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)))];
}

function bestOf(members) {
  const known = members.filter(member => member.reward !== null);
  const best = known.reduce((a, b) => a === null || b.reward > a.reward ? b : a, null);
  return best !== null && known.some(member => member.reward < best.reward) ? best : null;
}

// By which rewards a member is above or below its group: weight times the difference to the group's mean
function why(member, members, rewards) {
  const parts = rewards.filter(reward => reward.weight && typeof saidBy(member, reward.key) === "number").map(reward => {
    const known = members.map(other => saidBy(other, reward.key)).filter(value => typeof value === "number");
    return [reward.key, reward.weight * (saidBy(member, reward.key) - mean(known))];
  }).filter(([, difference]) => Math.abs(difference) >= 0.005).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  return parts.length ? `against its group: ${parts.slice(0, 3).map(([key, difference]) => `${key} ${signed(difference)}`).join(", ")}` : "";
}

function step(block, said, advantage) {
  const isText = block.type === "text", tags = element("div", {class: "tags"}, element("span", {class: "kind"}, isText ? "text" : "picture"));
  if (typeof advantage === "number") tags.append(element("span", {class: advantage > 0 ? "up" : advantage < 0 ? "down" : "", title: "the advantage with which this step was trained"}, `${advantage > 0 ? "▲" : advantage < 0 ? "▼" : "■"} ${signed(advantage)}`));
  for (const [name, value] of Object.entries(said)) tags.append(element("span", value === null ? {class: "missing"} : {}, `${name} ${value === null ? "missing" : short(value)}`));
  const content = isText ? element("div", {class: "said"}, block.text || "(nothing)") : element("img", {src: block.image, alt: "a picture of the answer"});
  const made = element("div", {class: `step ${isText ? "text" : "image"}`}, content, tags);
  if (typeof advantage === "number" && advantage) {
    made.style.borderLeftColor = `rgba(var(--${advantage > 0 ? "good" : "bad"}-rgb), ${(0.3 + 0.7 * Math.min(Math.abs(advantage) / STRONG, 1)).toFixed(2)})`;
    made.style.background = tint(advantage / STRONG / 2);
  }
  return made;
}

function card(member, members, rewards, id) {
  const isBest = member === bestOf(members), reasons = why(member, members, rewards);
  const made = element("article", {class: `member${isBest ? " best" : ""}${member.found ? "" : " other"}`, id: `${id}-${member.number}`},
    element("h5", {}, `#${member.number + 1}`, element("span", {}, `${member.reward === null ? "" : `reward ${short(member.reward)}`}${isBest ? ", the best" : ""}`)));
  if (members.some(other => why(other, members, rewards))) made.append(element("p", {class: "why"}, reasons));
  member.answer.forEach((block, n) => made.append(step(block, member.steps[n] ?? {}, member.advantages[n])));
  const whole = element("div", {class: "tags"});
  for (const [name, value] of Object.entries(member.document)) whole.append(element("span", value === null ? {class: "missing"} : {}, `${name} ${value === null ? "missing" : short(value)}`));
  for (const [name, value] of Object.entries(member.extra)) whole.append(element("span", {}, `${name}: ${value}`));
  if (whole.childNodes.length) { whole.prepend(element("span", {class: "kind"}, "document")); made.append(whole); }
  return made;
}

// group: {step, group, prompt, members}; rewards: those of the run; order: "sampled" or "best"
export function groupCard(group, rewards, order) {
  const id = `d${group.step}-${group.group}`;
  const members = order === "best" ? [...group.members].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity)) : group.members;
  const names = [...new Set([...rewards.map(reward => reward.key), ...group.members.flatMap(member => [...member.steps.flatMap(Object.keys), ...Object.keys(member.document)])])]
    .filter(name => members.some(member => saidBy(member, name) !== undefined));
  const found = group.members.filter(member => member.found).length;
  const where = `step ${group.step}${group.members.length > 1 ? `, group ${group.group + 1}: ${found < group.members.length ? `${found} of ` : ""}${group.members.length} documents` : ""}`;
  return element("article", {class: "group"}, element("header", {}, element("span", {class: "where"}, where), element("div", {class: "prompt"}, ...blocks(group.prompt))),
    ...(members.length > 1 ? scores(members, rewards, names, id) : []), element("div", {class: "members"}, ...members.map(member => card(member, group.members, rewards, id))));
}
