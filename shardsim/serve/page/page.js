"use strict";
// The page of `shardsim serve`: controls make a request, the answer is shown. All figures, tables
// and messages are made by shardsim; text goes into the page as text, never as HTML.

const $ = (id) => document.getElementById(id);
const QUESTION = { model: "model", machine: "slice", batch: "batch", sequence: "sequence" };
const STEP = {
  remat: "remat",
  microbatches: "microbatches",
  "overlap.matmul": "collective matmul",
  "overlap.weights": "prefetch weights",
  "overlap.gradients": "overlap gradients",
  "context.keys": "context: keys",
  "context.order": "context: tokens",
  attention: "attention",
  optimizer: "optimizer",
};
const PRICING = { costs: "op costs", as: "done as" };
const POWERS = 6; // a slider goes so many doublings up and down
const MOST_MICROBATCHES = 64;
const PERCENTS = [25, 50, 75, 90, 100, 110, 125, 150, 200, 300, 400];
const WAIT_MS = 40; // after a change, for the next one

let start; // what the page must know
let answer; // the last good one
let pinned = null; // a request
let state = {}; // what is changed: see `fresh`
let latest = 0; // the last request's number
let timer;

const fresh = (plan) => ({ plan, values: {}, mesh: null, rest: null, chip: {}, text: "" });

// Elements.

/** Return the end of a path that is too long for its control. */
function ending(name) {
  return name.length > 26 ? `…${name.slice(-25)}` : name;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function choice(id, names, change) {
  const select = make("select", { id });
  select.append(...names.map((name) => make("option", { value: name, textContent: name })));
  select.addEventListener("change", () => change(select.value));
  return select;
}

function row(id, label, ...parts) {
  return make("div", { className: "row", id: `row-${id}` },
    make("label", { htmlFor: id, textContent: label }), ...parts);
}

// A text and a slider over `steps`, a function that gives its values. Both say the same.
function stepped(key, label, steps) {
  const slider = make("input", { type: "range", id: `slide-${key}`, min: 0, step: 1 });
  const text = make("input", { type: "text", id: key, inputMode: "numeric" });
  slider.setAttribute("aria-label", `${label}, slider`);
  slider.addEventListener("input", () => {
    text.value = steps()[slider.value];
    slider.setAttribute("aria-valuetext", text.value);
    set(key, text.value);
  });
  text.addEventListener("change", () => set(key, text.value.trim()));
  return row(key, label, slider, text);
}

function place(slider, values, value) {
  const at = values.findIndex((one) => one >= value);
  slider.max = values.length - 1;
  slider.value = at < 0 ? values.length - 1 : at;
  slider.setAttribute("aria-valuetext", String(value));
}

// `cells` of a table as an element; `more` adds an element before or after a row's cells.
function table(cells, more = {}) {
  const kind = (index) => {
    const most = Math.max(0, ...cells.rows.map((one) => one[index].length));
    return cells.columns[index].number ? "n" : most > 34 ? "long" : "";
  };
  const kinds = cells.columns.map((_, index) => kind(index));
  const head = make("tr", {}, ...cells.columns.map((column, index) =>
    make("th", { scope: "col", className: kinds[index], textContent: column.label })));
  if (more.after) head.append(make("td"));
  if (more.before) head.prepend(make("td"));
  const body = make("tbody");
  cells.rows.forEach((texts, number) => {
    const line = make("tr", {}, ...texts.map((text, index) =>
      make(index ? "td" : "th", { className: kinds[index], textContent: text })));
    line.firstChild.scope = "row";
    if (more.swatch) line.firstChild.prepend(make("span", { className: `swatch s${number}` }));
    if (more.after) line.append(make("td", {}, more.after(number)));
    if (more.before) line.prepend(make("td", {}, more.before(number)));
    body.append(line);
  });
  return make("table", {}, make("thead", {}, head), body);
}

// What is asked.

const steps = {
  batch: () => doublings(answer.base.values.batch),
  sequence: () => doublings(answer.base.values.sequence),
  microbatches: () => Array.from({ length: Math.log2(MOST_MICROBATCHES) + 1 }, (_, n) => 2 ** n),
};

function doublings(value) {
  const found = [];
  for (let power = -POWERS; power <= POWERS; power += 1) found.push(value * 2 ** power);
  return found.filter((one) => Number.isInteger(one));
}

function divisors(number) {
  const found = [];
  for (let n = 1; n * n <= number; n += 1) if (number % n === 0) found.push(n, number / n);
  return [...new Set(found)].sort((a, b) => a - b);
}

function set(key, value) {
  if (value === "" || String(value) === String(answer.base.values[key])) delete state.values[key];
  else state.values[key] = value;
  ask();
}

// The axis that takes the rest while `axis` is changed: the marked one, or another.
function taker(axis) {
  const others = answer.controls.mesh.filter((one) => one.axis !== axis);
  if (state.rest && state.rest !== axis) return state.rest;
  const used = others.filter((one) => one.size > 1).sort((a, b) => b.size - a.size);
  const spare = others.filter((one) => ["data", "fsdp"].includes(one.role));
  return (used[0] || spare[0] || others[0]).axis;
}

function setAxis(axis, size) {
  state.rest = taker(axis);
  state.mesh = {};
  for (const one of answer.controls.mesh) {
    const now = one.axis === axis ? size : one.size;
    const there = answer.base.mesh.some((base) => base.axis === one.axis && base.there);
    if (one.axis !== state.rest && (now > 1 || there)) state.mesh[one.axis] = now;
  }
  ask();
}

function request() {
  const lines = state.text.split("\n").map((line) => line.trim()).filter(Boolean);
  const sets = Object.entries(state.values).map(([key, value]) => `${key}=${value}`);
  return { plan: state.plan, set: [...sets, ...lines], mesh: state.mesh || {},
    rest: state.mesh ? state.rest : null, chip: state.chip };
}

const priced = () => ({ costs: $("costs").value, as: $("as").value });

// Without a body nothing is asked: `start` tells.
async function call(name, body) {
  let data;
  const headers = { "Content-Type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body) };
  try {
    data = await (await fetch(`/api/${name}`, options)).json();
  } catch {
    throw new Error("shardsim does not answer: was the command ended?");
  }
  if (data.error) throw new Error(data.error);
  return data;
}

function ask() {
  clearTimeout(timer);
  timer = setTimeout(predict, WAIT_MS);
}

async function predict() {
  const mine = (latest += 1);
  const began = performance.now();
  try {
    const found = await call("predict", { ...request(), ...priced(), pinned });
    if (mine !== latest) return; // another change was faster
    answer = found;
    show(performance.now() - began);
    fail("");
  } catch (error) {
    if (mine === latest) fail(error.message);
  }
}

function fail(text) {
  $("error").hidden = !text;
  $("error").textContent = text;
  for (const id of ["top", "results"]) $(id).classList.toggle("stale", Boolean(text));
}

// A long piece of work behind a button.
async function work(button, name, body, done) {
  const label = button.textContent;
  button.disabled = true;
  button.textContent = `${label} …`;
  try {
    done(await call(name, body));
    fail("");
  } catch (error) {
    fail(error.message);
  }
  button.disabled = false;
  button.textContent = label;
}

// What is shown.

function show(tookMs) {
  showControls();
  const { prediction, tables, headline } = answer;
  $("says").textContent = answer.says;
  $("headline").replaceChildren(...headline.map(({ what, value, against }) => {
    const bad = what.startsWith("HBM") && !prediction.fits;
    const parts = [make("dt", { textContent: what }), make("dd", { textContent: value })];
    if (bad) parts.push(make("dd", { className: "warn", textContent: "does not fit" }));
    if (against) parts.push(make("dd", { className: "against", textContent: `${against} to pinned` }));
    return make("div", { className: bad ? "bad" : "" }, ...parts);
  }));
  $("warnings").replaceChildren(...prediction.warnings.map((text) => make("li", { textContent: text })));
  $("parts").replaceChildren(table(tables.parts, { swatch: true }));
  $("hbm").replaceChildren(table(tables.hbm, { swatch: true }));
  bars("time-bars", start.parts, (one) => one.time, (one) => one.step_time_s);
  bars("hbm-bars", start.hbm, (one) => one.hbm, (one) => one.hbm.peak_bytes, (one) => one.hbm.capacity_bytes);
  showLimits(tables);
  $("collectives").replaceChildren(tables.collectives.rows.length
    ? table(tables.collectives) : make("p", { textContent: "none" }));
  $("held").replaceChildren(table(tables.held));
  $("side").hidden = !pinned;
  $("unpin").hidden = !pinned;
  if (pinned) {
    $("beside").replaceChildren(table(tables.beside));
    $("differs").replaceChildren(tables.differs.rows.length
      ? table(tables.differs) : make("p", { textContent: "Their files say the same." }));
  }
  $("command").textContent = answer.command;
  $("about").textContent = `${answer.controls.values.model} on ${answer.controls.values.machine}, ${answer.priced}`;
  $("took").textContent = `Answered in ${Math.round(tookMs)} ms.`;
}

function bars(id, kinds, parts, total, limit) {
  const shown = answer.pinned ? { pinned: answer.pinned, "this plan": answer.prediction }
    : { "this plan": answer.prediction };
  const ends = Object.values(shown).flatMap((one) => [total(one), limit ? limit(one) : 0]);
  const most = Math.max(...ends) * 1.02;
  $(id).replaceChildren(...Object.entries(shown).map(([name, one]) => {
    const bar = make("div", { className: "bar" });
    bar.setAttribute("aria-hidden", "true"); // the table below says the same
    kinds.forEach((kind, index) => {
      const piece = make("i", { className: `s${index}` });
      piece.style.width = `${(100 * Math.max(0, parts(one)[kind])) / most}%`;
      bar.append(piece);
    });
    if (limit) {
      const mark = make("b", { title: "what a device has" });
      mark.style.left = `${(100 * limit(one)) / most}%`;
      bar.append(mark);
    }
    return make("div", { className: "bar-row" }, make("span", { textContent: name }), bar);
  }));
}

function showLimits(tables) {
  const most = Math.max(1, ...tables.elasticities.map(Math.abs));
  const bar = (number) => {
    const piece = make("i");
    piece.style.width = `${(100 * Math.abs(tables.elasticities[number])) / most}%`;
    return make("div", { className: "elasticity" }, piece);
  };
  $("limits").replaceChildren(table(tables.limits, { after: bar }));
}

function showControls() {
  const { base, controls } = answer;
  const values = controls.values;
  for (const key of [...Object.keys(QUESTION), ...Object.keys(STEP)]) {
    const input = $(key);
    if (input.type === "checkbox") input.checked = values[key];
    else if (input !== document.activeElement || input.tagName === "SELECT") {
      own(input, String(values[key]));
      input.value = values[key];
    }
    if (steps[key]) place($(`slide-${key}`), steps[key](), values[key]);
    $(`row-${key}`).classList.toggle("changed", String(values[key]) !== String(base.values[key]));
  }
  $("slices").replaceChildren(...controls.slices.map((name) => make("option", { value: name })));
  const split = controls.mesh.some((one) => one.role === "context" && one.size > 1);
  for (const key of ["context.keys", "context.order"]) $(`row-${key}`).hidden = !split;
  showMesh();
  showChip();
}

// A select has the plan's own value too, such as what some layers keep.
function own(input, value) {
  if (input.tagName !== "SELECT" || [...input.options].some((one) => one.value === value)) return;
  input.prepend(make("option", { value, textContent: value }));
}

function showMesh() {
  const { base, controls } = answer;
  const axes = controls.mesh;
  const sizes = divisors(controls.devices);
  const drawn = [...$("mesh").children].map((one) => one.dataset.axis).join();
  if (drawn !== axes.map((one) => one.axis).join()) {
    $("mesh").replaceChildren(...axes.map(({ axis, role }) => axisRow(axis, role)));
  }
  const largest = [...axes].sort((a, b) => b.size - a.size)[0].axis;
  for (const { axis, size } of axes) {
    const slider = $(`mesh-${axis}`);
    slider.dataset.sizes = sizes.join();
    place(slider, sizes, size);
    $(`size-${axis}`).textContent = size.toLocaleString("en");
    $(`rest-${axis}`).checked = axis === (state.rest || largest);
    const before = base.mesh.find((one) => one.axis === axis);
    $(`row-mesh-${axis}`).classList.toggle("changed", size !== (before ? before.size : 1));
  }
}

function axisRow(axis, role) {
  const slider = make("input", { type: "range", id: `mesh-${axis}`, min: 0, step: 1 });
  slider.addEventListener("input", () => {
    const size = Number(slider.dataset.sizes.split(",")[slider.value]);
    $(`size-${axis}`).textContent = size.toLocaleString("en");
    setAxis(axis, size);
  });
  const rest = make("input", { type: "radio", name: "rest", id: `rest-${axis}` });
  rest.setAttribute("aria-label", `${axis} takes what the others leave of the slice`);
  rest.addEventListener("change", () => { state.rest = axis; });
  const size = make("output", { id: `size-${axis}` });
  size.setAttribute("for", `mesh-${axis}`);
  const line = row(`mesh-${axis}`, axis === role ? axis : `${axis} (${role})`, slider,
    make("div", { className: "rest" }, size, rest));
  line.dataset.axis = axis;
  return line;
}

function showChip() {
  const drawn = [...$("chip").children].map((one) => one.dataset.figure).join();
  if (drawn !== answer.figures.map((one) => one.figure).join()) {
    $("chip").replaceChildren(...answer.figures.map(chipRow));
  }
  for (const { figure, words, text } of answer.figures) {
    const percent = Math.round(100 * (state.chip[figure] || 1));
    place($(`chip-${figure}`), PERCENTS, percent);
    $(`chip-${figure}`).setAttribute("aria-valuetext", `${percent} % of ${text}`);
    $(`share-${figure}`).textContent = `${percent} %`;
    const line = $(`row-chip-${figure}`);
    line.firstChild.textContent = `${words}, ${text}`;
    line.classList.toggle("changed", percent !== 100);
  }
}

function chipRow({ figure }) {
  const slider = make("input", { type: "range", id: `chip-${figure}`, min: 0, step: 1 });
  slider.addEventListener("input", () => {
    const percent = PERCENTS[slider.value];
    $(`share-${figure}`).textContent = `${percent} %`;
    if (percent === 100) delete state.chip[figure];
    else state.chip[figure] = percent / 100;
    ask();
  });
  const line = row(`chip-${figure}`, "", slider, make("output", { id: `share-${figure}` }));
  line.dataset.figure = figure;
  return line;
}

// Buttons.

function take(name) {
  if (![...$("plan").options].some((one) => one.value === name)) {
    $("plan").append(make("option", { value: name, textContent: name }));
  }
  $("plan").value = name;
  const { chip } = state;
  const best = name.startsWith("best "); // of a search, for the chip as the sliders have it
  state = fresh(name);
  state.chip = best ? chip : {};
  $("found").hidden = !best;
  $("text").value = "";
  return predict();
}

function apply(sets) {
  for (const text of sets) {
    const [key, ...value] = text.split("=");
    if (key.startsWith("mesh.") || !(key in answer.base.values)) {
      state.mesh = key.startsWith("mesh.") ? null : state.mesh;
      state.text = [...state.text.split("\n").filter((one) => one && !one.startsWith(`${key}=`)), text].join("\n");
    } else {
      state.values[key] = value.join("=");
    }
  }
  $("text").value = state.text;
  if (state.text) $("text").closest("details").open = true;
  ask();
}

function found(title, data, label, press) {
  const button = (number) => {
    const one = make("button", { type: "button", textContent: label });
    one.setAttribute("aria-label", `${label} number ${number + 1}`);
    one.addEventListener("click", () => press(number));
    return one;
  };
  const close = make("button", { type: "button", textContent: "Close" });
  close.addEventListener("click", () => { $("found").hidden = true; });
  const region = make("div", { className: "scroll", tabIndex: 0 }, table(data.table, { before: button }));
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", title);
  $("found").replaceChildren(make("h2", { textContent: title }),
    make("p", { className: "hint", textContent: data.says }), region, close);
  $("found").hidden = false;
}

function download({ name, text, says }) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  $("exported").textContent = says ? `${name} (${says})` : name;
}

function buttons() {
  $("pin").addEventListener("click", () => { pinned = request(); predict(); });
  $("unpin").addEventListener("click", () => { pinned = null; $("pin").focus(); predict(); });
  $("reset").addEventListener("click", () => take(state.plan));
  $("search").addEventListener("click", (event) => work(event.target, "search",
    { ...request(), ...priced() },
    (data) => found("Best plans", data, "Take", (number) => take(data.plans[number]))));
  $("explain").addEventListener("click", (event) => work(event.target, "explain",
    { ...request(), ...priced() },
    (data) => found("Single changes that would help", data, "Try", (number) => apply(data.sets[number]))));
  $("export").addEventListener("click", (event) => work(event.target, "export",
    { ...request(), form: $("form").value }, download));
  $("plan").addEventListener("change", () => take($("plan").value));
  $("text").addEventListener("change", () => { state.text = $("text").value; ask(); });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

// The controls, once.
function build() {
  const { choices } = start;
  const controls = (labels) => Object.entries(labels).map(([key, label]) => {
    if (steps[key]) return stepped(key, label, steps[key]);
    if (choices[key]) return row(key, label, choice(key, choices[key], (value) => set(key, value)));
    if (key === "machine") {
      const text = make("input", { type: "text", id: key, className: "wide" });
      text.setAttribute("list", "slices");
      text.addEventListener("change", () => set(key, text.value.trim()));
      return row(key, label, text);
    }
    const box = make("input", { type: "checkbox", id: key });
    box.addEventListener("change", () => set(key, box.checked));
    return row(key, label, box);
  });
  $("question").append(...controls(QUESTION));
  $("step").append(...controls(STEP));
  $("pricing").append(...Object.entries(PRICING).map(([key, label]) => {
    const select = choice(key, choices[key], predict);
    select.prepend(make("option", { value: "", textContent: "as usual", selected: true }));
    return row(key, label, select);
  }));
  $("plan").append(...start.plans.map((name) => make("option", { value: name, textContent: ending(name) })));
  $("form").append(...choices.form.map((name) => make("option", { value: name, textContent: name })));
  buttons();
}

async function begin() {
  try {
    start = await call("start");
  } catch (error) {
    fail(error.message);
    return;
  }
  build();
  await take(start.plans[0]);
}

begin();
