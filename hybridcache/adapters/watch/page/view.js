// One cache: its numbers, tree, memory and conversations.
class View {
  constructor(model, { ask = null } = {}) {
    this.model = model;
    this.selectedRequest = null;
    this.stats = element("dl.stats");
    this.meter = element("div.meter", { role: "img" });
    this.shares = element("div.legend.shares");
    this.tree = new TreeCanvas(this);
    this.table = new TreeTable(this);
    this.strip = new Strip(this);
    this.lanes = new Lanes(this);
    this.details = new Details(this, ask);
    this.size = element("span.soft");
    this.legend = element("div.legend");
    const card = element("section.card", { "aria-label": "Tree of cached prefixes" }, this.toolbar(), this.tree.element, this.table.element, this.legend, this.strip.element);
    this.element = element("div.view", {}, element("div", {}, this.stats, this.meter, this.shares), card, this.lanes.element);
    this.theme();
  }

  toolbar() {
    const name = `by${Math.random()}`;
    this.radios = COLOURS.map((by, at) => element("input", { type: "radio", name, value: by, checked: at === 0, onchange: () => this.colourBy(by) }));
    const choices = this.radios.map((radio) => element("label", {}, radio, radio.value));
    const button = (text, label, act) => element("button.quiet", { type: "button", title: label, "aria-label": label, onclick: act }, text);
    const toggle = element("button.quiet", { type: "button", "aria-pressed": "false", onclick: () => this.toggleTable(toggle) }, "table");
    return element("header", {}, element("h2", {}, "Tree"), this.size, element("div.tools", {},
      element("fieldset.seg", { style: "margin: 0; padding: 0", "aria-label": "Colour by" }, ...choices),
      element("span.soft.wheel", {}, "Ctrl + wheel zooms"), button("−", "Zoom out", () => this.tree.zoomBy(1 / 1.5)), button("+", "Zoom in", () => this.tree.zoomBy(1.5)), button("fit", "Show all", () => this.tree.focusOn(null)), toggle));
  }

  colourBy(by) {
    this.tree.by = by;
    for (const radio of this.radios) radio.checked = radio.value === by;
    this.tree.draw();
    this.showLegend();
  }

  toggleTable(button) {
    const isTable = this.table.element.hidden;
    this.table.element.hidden = !isTable;
    this.tree.element.hidden = isTable;
    button.setAttribute("aria-pressed", isTable);
    button.textContent = isTable ? "picture" : "table";
    this.table.update();
  }

  showLegend() {
    const { by, ramps } = this.tree;
    const ends = { age: ["long ago", "just used"], hits: ["no hit", "many"], bytes: ["light", "heavy"] }[by];
    const item = (kind, label) => key(element(`i.${kind}`), label);
    this.legend.replaceChildren(
      element("span", {}, ends[0], element("i.ramp", { style: `background: linear-gradient(90deg, ${ramps[by].join(",")})` }), ends[1]),
      ...(this.model.meta.state_bytes ? [item("tick", "checkpoint"), item("tick.old", "superseded checkpoint"), item("lost", "evicted checkpoint"), item("hatch", "KV without a state")] : []),
      item("ghost", "ghost"), item("lock", "locked"),
    );
  }

  theme() {
    this.tree.theme();
    this.showLegend();
    this.strip.update();
  }

  // Another state of the same cache, or another cache.
  show(model) {
    const selected = this.tree.selected?.id;
    this.model = model;
    this.tree.selected = model.nodes.get(selected) ?? null;
    this.tree.hovered = null;
    this.tree.tip.hidden = true;
    this.update();
    this.showLegend();
  }

  update() {
    this.tree.update();
    this.table.update();
    this.strip.update();
    this.lanes.update();
    this.numbers();
    const isEmpty = this.tree.items.length === 0;
    this.tree.canvas.setAttribute("aria-label", `${count(this.model.nodes.size, "node")}. Arrow keys walk the tree, plus and minus zoom.`);
    this.tree.note.hidden = !isEmpty;
    if (isEmpty) this.tree.note.replaceChildren(element("strong", {}, "Nothing is cached yet"), element("span", {}, this.details ? "Send a request, or say something in the chat." : "The first request is still to come."));
  }

  numbers() {
    const { model } = this;
    const { memory } = model;
    const done = [...model.requests.values()].filter((one) => !GOING.has(one.state)).slice(-32);
    const middle = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
    const ttft = middle(done.filter((one) => one.first_token_s !== null).map((one) => one.first_token_s - one.arrived_s));
    const rate = middle(done.map(speed).filter((one) => one !== null));
    const prompt = memory ? memory.prompt_tokens : model.tokens.prompt;
    const cached = memory ? memory.cached_tokens : model.tokens.cached;
    const curve = hitCurve([...model.requests.values()].filter((one) => !GOING.has(one.state) && one.losses).slice(-240));
    let [tokens, checkpoints] = [0, 0];
    for (const node of model.nodes.values()) { tokens += node.end - node.start; checkpoints += node.saved ? 1 : 0; }
    const pair = (name, value, unit, kind = "", term = name) => element(`div${kind}`, {}, element("dt", { title: TERMS[term] }, name), element("dd", {}, value, ...(unit ? [element("small", {}, unit)] : [])));
    this.stats.replaceChildren(
      pair("prompt tokens reused", percent(cached, prompt), prompt ? `of ${brief.format(prompt)}` : "", ".big"),
      ...(curve ? [pair("reused, over the latest requests", curve.element, curve.told)] : []),
      pair("cached", brief.format(tokens), "tokens"), ...(model.meta.state_bytes ? [pair("checkpoints", whole.format(checkpoints), "", "", "checkpoint")] : []),
      pair("requests", whole.format(model.time)), ...(memory?.running !== undefined ? [pair("running", whole.format(memory.running), memory.waiting ? `+ ${memory.waiting} waiting` : "")] : []),
      ...(memory?.sessions ? [pair("live sessions", whole.format(memory.sessions[0]), memory.sessions[1] ? `${memory.sessions[1]} waiting` : "")] : []),
      ...(ttft !== undefined ? [pair("TTFT, median", seconds(ttft), "", "", "TTFT")] : []), ...(rate !== undefined ? [pair("tokens/s per request, median", rate.toFixed(0))] : []),
      ...(memory?.admission ? [pair("admission", element("span", { title: memory.admission }, memory.admission.split(";").slice(0, 2).join(":")), "", ".decision")] : []),
    );
    this.size.textContent = count(model.nodes.size, "node");
    const sums = Object.fromEntries(CAUSES.map(([name]) => [name, 0]));
    let hits = 0;
    for (const one of done) if (one.losses) { hits += one.cached; for (const [name] of CAUSES) sums[name] += one.losses[name]; }
    const all = hits + Object.values(sums).reduce((a, b) => a + b, 0);
    const parts = [["hit", "reused", hits], ...CAUSES.map(([name, label]) => [name, label, sums[name]])].filter(([, , number]) => number > 0);
    this.meter.replaceChildren(...parts.map(([name, label, number]) => element("i", { style: `flex: ${number} 0 0; background: var(--${name})`, title: `${label}: ${percent(number, all)} of the last ${done.length} requests' tokens` })));
    this.shares.hidden = !parts.length;
    this.shares.replaceChildren(`last ${count(done.length, "request")}: `, ...parts.map(([name, label, number]) => key(swatch(`var(--${name})`), `${label} ${percent(number, all)}`, TERMS[label])));
    this.meter.setAttribute("aria-label", parts.map(([, label, number]) => `${label} ${percent(number, all)}`).join(", ") || "no request yet");
  }

  describe(node) {
    const { model } = this;
    const lines = [`${whole.format(node.start)}–${whole.format(node.end)}`];
    if (node.ghost !== null) return [...lines, "ghost: tokens remembered, KV gone"];
    lines.push(`${count(node.end - node.start, "token")}, ${size((node.end - node.start) * model.meta.kv_bytes)}`);
    if (node.saved) lines.push(`checkpoint${node.saved.label ? ` by ${node.saved.label}` : ""}`);
    else if (node.lost) lines.push("its checkpoint was evicted");
    else if (!node.hasState && model.meta.state_bytes) lines.push("KV without a state: nothing resumes here");
    lines.push(`${count(node.hits, "hit")}, last used ${ago(model.time - node.recent)}`);
    return lines;
  }

  select(node) {
    this.tree.selected = node;
    this.selectedRequest = null;
    this.strip.mark([]);
    if (node) { this.details.node(node); speak(this.describe(node).join(", ")); } else this.details.hint();
    this.update();
  }

  selectRequest(id) {
    const one = this.model.requests.get(id);
    if (!one) return;
    this.selectedRequest = id;
    this.tree.selected = this.model.nodes.get(one.node) ?? null;
    this.strip.mark([]);
    this.details.request(one);
    this.update();
  }

  // The request that is shown went on.
  refresh() {
    const one = this.model.requests.get(this.selectedRequest);
    if (one && this.shownState !== `${one.id} ${one.state}`) {
      this.shownState = `${one.id} ${one.state}`;
      this.details.request(one);
    }
  }
}

// Share of reused prompt tokens over time as a small curve, 0 to 100 %; null for fewer than three points.
function hitCurve(done) {
  const step = Math.max(1, Math.ceil(done.length / 40));
  const rates = [];
  for (let at = 0; at < done.length; at += step) {
    const some = done.slice(at, at + step);
    const prompt = some.reduce((sum, one) => sum + one.prompt, 0);
    if (prompt) rates.push(some.reduce((sum, one) => sum + one.cached, 0) / prompt);
  }
  if (rates.length < 3) return null;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", rates.map((rate, at) => `${(1 + 118 * at / (rates.length - 1)).toFixed(1)},${(21 - 20 * rate).toFixed(1)}`).join(" "));
  svg.setAttribute("viewBox", "0 0 120 22");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Reused share of the latest ${done.length} requests, from ${percent(rates[0], 1)} to ${percent(rates.at(-1), 1)}`);
  svg.append(line);
  return { element: element("span.curve", { title: `${done.length} requests, 0 to 100 %` }, svg), told: `now ${percent(rates.at(-1), 1)}` };
}
