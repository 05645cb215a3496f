// Memory: what is free, cached and held, and where memory is one arena its slabs, in cells of one or several.
class Strip {
  constructor(view) {
    this.view = view;
    this.words = element("p");
    this.canvas = element("canvas", { role: "img", height: 18 });
    this.marked = new Set();
    this.key = element("div.legend");
    this.element = element("div.memory", {}, this.words, this.canvas, this.key);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    new ResizeObserver(() => this.update()).observe(this.element);
  }

  update() {
    const { memory, meta, slabs } = this.view.model;
    this.element.hidden = !memory;
    if (!memory || !this.view.tree.colour) return;
    const [free, cached, held] = memory.bytes;
    const all = free + cached + held;
    const bold = (text) => element("b", {}, text);
    const [, kv, slots] = [0, memory.kv, memory.slots];
    this.words.replaceChildren(
      element("span", {}, `${slabs ? "arena" : "memory"} `, bold(size(all))),
      element("span", {}, bold(percent(cached, all)), " cached"), element("span", {}, bold(percent(held, all)), " held by requests"), element("span", {}, bold(percent(free, all)), " free"),
      element("span", {}, bold(brief.format(kv[1])), " KV tokens cached"), ...(meta.state_bytes ? [element("span", {}, bold(whole.format(slots[1])), ` checkpoint${slots[1] === 1 ? "" : "s"} of ${size(meta.state_bytes)}`)] : []),
    );
    if (slabs?.percent.length) this.cells(slabs);
    else this.pools(memory);
    this.explain(Boolean(slabs?.percent.length));
  }

  // Meaning of the colours, as they are drawn.
  explain(isArena) {
    const { tree, model } = this.view;
    const [kv, state] = isArena ? [tree.ramps.age[Math.round(STEPS * 0.55)], tree.ramps.bytes[STEPS - 2]] : [tree.ramps.age[STEPS - 3], tree.ramps.bytes[STEPS - 2]];
    this.key.replaceChildren(
      isArena ? key(swatch(kv), "slab of KV, filled to its share of rows", TERMS.slab) : key(swatch(kv), "cached KV", TERMS.KV),
      ...(model.meta.state_bytes ? [key(swatch(state), "checkpoint")] : []),
      key(swatch(tree.colour.lock), isArena ? "state of a running request" : "held by requests", TERMS.locked),
      key(swatch(tree.colour.line), "free", "Not in use"),
    );
  }

  context(height) {
    const [width, scale] = [this.element.clientWidth - 28, devicePixelRatio || 1];
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    return [context, width];
  }

  cells({ percent: filled, states, each }) {
    const room = Math.max(this.element.clientWidth - 28, 1);
    const edge = Math.max(4, Math.min(16, Math.floor(Math.sqrt(room * 54 / filled.length))));
    const perRow = Math.floor(room / edge);
    const rows = Math.ceil(filled.length / perRow);
    const [context] = this.context(rows * edge);
    const { tree, model } = this.view;
    const checkpoints = new Set();
    for (const node of model.nodes.values()) if (node.saved) checkpoints.add(Math.floor(node.saved.slot / each));
    const [kv, state] = [tree.ramps.age[Math.round(STEPS * 0.55)], tree.ramps.bytes[STEPS - 2]];
    const marked = new Set([...this.marked].map((slab) => Math.floor(slab / each)));
    const inner = edge > 5 ? edge - 2 : edge - 1;
    for (const [at, share] of filled.entries()) {
      const left = at % perRow * edge;
      const top = Math.floor(at / perRow) * edge;
      context.fillStyle = tree.colour.line;
      context.fillRect(left, top, inner, inner);
      if (share) {
        const height = Math.max(1, inner * share / 100);
        const ofState = checkpoints.has(at) ? state : tree.colour.lock;
        context.fillStyle = states.has(at) ? ofState : kv;
        context.fillRect(left, top + inner - height, inner, height);
      }
      if (marked.has(at)) {
        context.strokeStyle = tree.colour.ink;
        context.lineWidth = 1.5;
        context.strokeRect(left - 0.5, top - 0.5, inner + 1, inner + 1);
      }
    }
    this.grid = { edge, perRow, filled, states, checkpoints, each };
    const numFree = filled.filter((share) => !share).length;
    this.canvas.setAttribute("aria-label", `${filled.length} ${each > 1 ? `cells of ${each} slabs` : "slabs"}: ${states.size} with a state, ${filled.length - states.size - numFree} with KV, ${numFree} free`);
  }

  pools(memory) {
    this.grid = null;
    const rows = [memory.kv, ...(this.view.model.meta.state_bytes ? [memory.slots] : [])];
    const [context, width] = this.context(rows.length * 10);
    const { tree } = this.view;
    for (const [at, [free, cached, held]] of rows.entries()) {
      const all = free + cached + held || 1;
      context.fillStyle = tree.colour.line;
      context.fillRect(0, at * 10, width, 7);
      context.fillStyle = at ? tree.ramps.bytes[STEPS - 2] : tree.ramps.age[STEPS - 3];
      context.fillRect(0, at * 10, width * cached / all, 7);
      context.fillStyle = tree.colour.lock;
      context.fillRect(width * cached / all, at * 10, width * held / all, 7);
    }
    this.canvas.setAttribute("aria-label", "KV rows, and state slots below: cached, held, free");
  }

  point(event) {
    if (!this.grid) return;
    const { edge, perRow, filled, states, checkpoints, each } = this.grid;
    const at = Math.floor(event.offsetY / edge) * perRow + Math.floor(event.offsetX / edge);
    const kind = !states.has(at) ? "KV" : checkpoints.has(at) ? "a checkpoint" : "a running request's state";
    const name = each > 1 ? `slabs ${at * each} to ${(at + 1) * each - 1}` : `slab ${at}`;
    this.canvas.title = at >= filled.length ? "" : `${name}: ${filled[at] ? `${kind}, ${filled[at]} % in use` : "free"}`;
  }

  mark(slabs) {
    this.marked = new Set(slabs);
    this.update();
  }
}
