// The tree on a canvas: a node is as wide as its tokens, branches stand below each other.
const STEPS = 14;
const AXIS = 20;
const LANE = 44;
const THIN = 0.5;
const CELLS = 512; // Columns in which thin bars cover each other.
const COLOURS = ["age", "hits", "bytes"];

class TreeCanvas {
  constructor(view) {
    this.view = view;
    this.by = "age";
    this.selected = null;
    this.hovered = null;
    this.items = [];
    this.lanes = 1;
    this.deepest = 1;
    this.zoom = null; // {x, width, y, lane}: null fits all
    this.seen = { tree: -1 };
    this.frame = 0;
    this.canvas = element("canvas", { tabindex: 0, role: "application", "aria-roledescription": "tree of cached prefixes" });
    this.tip = element("div.tip", { hidden: true });
    this.note = element("div.note", { hidden: true });
    this.element = element("div.tree", {}, this.canvas, this.tip, this.note);
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  get model() { return this.view.model; }

  theme() {
    const names = ["bg", "panel", "line", "ink", "soft", "ghost", "lock", "accent", "checkpoint_evicted"];
    for (const by of COLOURS) names.push(`low-${by}`, `high-${by}`);
    const found = resolved(names);
    this.colour = Object.fromEntries(Object.entries(found).map(([name, value]) => [name, rgb(value)]));
    this.faded = Object.fromEntries(["ghost", "ink", "soft", "line"].map((name) => [name, (alpha) => rgb(found[name], alpha)]));
    this.ramps = Object.fromEntries(COLOURS.map((by) => [by, ramp(found[`low-${by}`], found[`high-${by}`], STEPS).map((one) => rgb(one))]));
    this.inkOn = Object.fromEntries(COLOURS.map((by) => [by, ramp(found[`low-${by}`], found[`high-${by}`], STEPS).map((one) => (luminance(one) > 0.179 ? "#000" : "#fff"))]));
    this.hatch = this.pattern(found.ink);
    this.draw();
  }

  pattern(ink) {
    const tile = document.createElement("canvas");
    const scale = devicePixelRatio || 1;
    tile.width = tile.height = Math.round(6 * scale);
    const context = tile.getContext("2d");
    context.strokeStyle = rgb(ink, 0.34);
    context.lineWidth = scale;
    const edge = tile.width;
    context.beginPath();
    for (const at of [-edge, 0, edge]) { context.moveTo(at, edge); context.lineTo(at + edge, 0); }
    context.stroke();
    const made = this.canvas.getContext("2d").createPattern(tile, "repeat");
    made.setTransform(new DOMMatrix().scale(1 / scale));
    return made;
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    const scale = devicePixelRatio || 1;
    if (!width || !height) return;
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    Object.assign(this, { width, height, scale });
    this.draw();
  }

  // Where each node stands, in lanes; O(nodes). What nothing resumes from stands below what is
  // used, and takes less room.
  layout() {
    const model = this.model;
    const items = [];
    let lanes = 0;
    let deepest = 1;
    const isFirst = this.seen.model !== model;
    for (const root of model.roots.values()) {
      if (!root.kids.length) continue;
      if (lanes) lanes += 0.4;
      const first = items.length;
      this.findStates(root);
      const waiting = [];
      const open = (kids) => {
        for (const isUsed of [false, true]) for (let at = kids.length - 1; at >= 0; at -= 1) if (kids[at].hasState === isUsed) waiting.push(kids[at]);
      };
      open(root.kids);
      while (waiting.length) {
        const node = waiting.pop();
        items.push(node);
        node.y0 = lanes;
        const isAlone = node.parent.kids.length === 1 && !node.parent.isRoot;
        node.isUsed = node.hasState || (isAlone && node.parent.isUsed); // back to the nearest fork
        if (!node.kids.length) lanes += node.isUsed ? 1 : THIN;
        node.y1 = lanes;
        if (node.end > deepest) deepest = node.end;
        open(node.kids);
      }
      for (let at = items.length - 1; at >= first; at -= 1) this.sum(items[at], isFirst);
    }
    this.items = items;
    this.lanes = Math.max(lanes, 1);
    this.deepest = deepest;
    this.seen = { tree: model.treeVersion, model };
  }

  // Whether something can be resumed at a node or below it.
  findStates(root) {
    const all = [...root.kids];
    for (let at = 0; at < all.length; at += 1) {
      const node = all[at];
      node.hasState = Boolean(node.saved) || (node.ghost === null && !this.model.meta.state_bytes);
      all.push(...node.kids);
    }
    for (let at = all.length - 1; at >= 0; at -= 1) if (all[at].hasState && !all[at].parent.isRoot) all[at].parent.hasState = true;
  }

  sum(node, isFirst) {
    let last = node.saved ? Math.max(node.last, node.saved.last) : node.last;
    let hits = node.uses;
    for (const kid of node.kids) {
      node.y1 = Math.max(kid.y1, node.y1);
      if (kid.ghost === null) { last = Math.max(last, kid.recent); hits += kid.hits; }
    }
    Object.assign(node, { recent: last, hits });
    if (node.cy0 === undefined || isFirst) {
      node.cy0 = node.y0;
      node.cy1 = node.y1;
      if (node.isNew && !isFirst) node.flash = performance.now();
    }
    node.isNew = false;
  }

  update() {
    if (this.seen.tree !== this.model.treeVersion || this.seen.model !== this.model) this.layout();
    this.draw();
  }

  draw() {
    if (!this.frame) this.frame = requestAnimationFrame((now) => { this.frame = 0; this.paint(now); });
  }

  // The part of the tree that is shown: tokens from x over width, lanes from y, each `lane` pixels.
  get shown() {
    const room = this.height - AXIS - 6;
    const fit = { x: 0, width: this.deepest * 1.03, y: 0, lane: Math.min(LANE, room / this.lanes) };
    return this.zoom ? { ...fit, ...this.zoom } : fit;
  }

  paint(now) {
    if (!this.width || !this.colour) return;
    const context = this.canvas.getContext("2d");
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    const isEmpty = this.items.length === 0;
    if (!isEmpty) {
      this.axis(context);
      context.save();
      context.beginPath();
      context.rect(0, AXIS, this.width, this.height - AXIS);
      context.clip();
      const moves = this.bars(context, now);
      context.restore();
      if (moves) this.draw();
    }
  }

  axis(context) {
    const { x, width } = this.shown;
    const perPixel = width / this.width;
    let step = 1;
    for (const factor of [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6]) { step = factor; if (factor / perPixel >= 90) break; }
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (let at = Math.ceil(Math.max(x, 0) / step) * step; at <= x + width; at += step) {
      const left = Math.round((at - x) / perPixel) + 0.5;
      context.strokeStyle = this.colour.line;
      context.beginPath();
      context.moveTo(left, AXIS - 3);
      context.lineTo(left, this.height);
      context.stroke();
      context.fillStyle = this.colour.soft;
      context.textAlign = left < 12 ? "left" : "center";
      if (left < this.width - 70) context.fillText(at >= 1e4 ? brief.format(at) : whole.format(at), Math.max(left, 6), 9);
    }
    context.textAlign = "right";
    context.fillText("tokens", this.width - 8, 9);
  }

  step(node) {
    const model = this.model;
    if (this.by === "age") return STEPS - 1 - Math.min(STEPS - 1, Math.floor(3 * Math.log2(1 + Math.max(0, model.time - node.recent))));
    if (this.by === "hits") return Math.min(STEPS - 1, Math.floor(2.2 * Math.log2(1 + node.hits)));
    const { kv_bytes: kv, state_bytes: state } = model.meta;
    const bytes = (node.end - node.start) * (kv ?? 1) + (node.saved ? state ?? 0 : 0);
    return Math.max(0, Math.min(STEPS - 1, Math.round((STEPS - 1) * (1 + Math.log2(bytes / this.largest) / 10))));
  }

  // Draws all that is in sight; true while something still moves.
  bars(context, now) {
    const { x, width, y, lane } = this.shown;
    const [scaleX, isCalm] = [this.width / width, matchMedia("(prefers-reduced-motion: reduce)").matches];
    const bins = Array.from({ length: STEPS }, () => []);
    const [hatched, ghosts, ticks, flashing] = [[], [], [], []];
    let moves = false;
    this.largest = 1;
    if (this.by === "bytes") for (const node of this.items) this.largest = Math.max(this.largest, (node.end - node.start) * (this.model.meta.kv_bytes ?? 1) + (node.saved ? this.model.meta.state_bytes : 0));
    const gap = lane >= 6 ? 2 : lane >= 3 ? 1 : 0;
    const stateful = (this.model.meta.state_bytes ?? 0) > 0;
    const covered = lane < 2 ? new Uint8Array(Math.ceil(this.height) * CELLS) : null;
    for (const node of this.items) {
      if (node.cy0 !== node.y0 || node.cy1 !== node.y1) {
        const ease = isCalm ? 1 : 0.28;
        node.cy0 += (node.y0 - node.cy0) * ease;
        node.cy1 += (node.y1 - node.cy1) * ease;
        if (Math.abs(node.cy0 - node.y0) + Math.abs(node.cy1 - node.y1) < 0.02) { node.cy0 = node.y0; node.cy1 = node.y1; } else moves = true;
      }
      const top = AXIS + 4 + (node.cy0 - y) * lane;
      const bottom = AXIS + 4 + (node.cy1 - y) * lane - gap;
      const left = (node.start - x) * scaleX;
      const right = (node.end - x) * scaleX;
      if (bottom < AXIS || top > this.height || right < 0 || left > this.width) { node.box = null; continue; }
      const box = node.box ??= { left: 0, top: 0, width: 0, height: 0 };
      box.left = left;
      box.top = top;
      box.width = Math.max(right - left - (right - left > 4 ? 1 : 0), 0.7);
      box.height = Math.max(bottom - top, 0.7);
      if (covered && box.height < 1 && this.isCovered(covered, box)) continue;
      if (node.ghost !== null) { ghosts.push(node); continue; }
      bins[this.step(node)].push(node);
      if (stateful && !node.hasState && box.width > 2 && box.height > 2) hatched.push(node);
      if ((node.saved || node.lost) && box.height > 1.6) ticks.push(node);
      if (node.flash && now - node.flash < 700 && !isCalm) flashing.push(node);
    }
    for (const [at, nodes] of bins.entries()) {
      if (!nodes.length) continue;
      context.fillStyle = this.ramps[this.by][at];
      for (const { box } of nodes) context.fillRect(box.left, box.top, box.width, box.height);
    }
    context.fillStyle = this.hatch;
    for (const { box } of hatched) context.fillRect(box.left, box.top, box.width, box.height);
    this.ghostBars(context, ghosts);
    this.marks(context, ticks);
    this.locks(context);
    this.labels(context, bins);
    for (const node of flashing) {
      context.strokeStyle = this.colour.accent;
      context.globalAlpha = 1 - (now - node.flash) / 700;
      context.lineWidth = 2;
      context.strokeRect(node.box.left + 1, node.box.top + 1, Math.max(node.box.width - 2, 1), Math.max(node.box.height - 2, 1));
      context.globalAlpha = 1;
      moves = true;
    }
    this.outline(context, this.hovered, this.colour.soft, 1.5);
    this.outline(context, this.selected, this.colour.ink, 2.5);
    return moves;
  }

  // Whether others, drawn before, fill all the pixels of a bar thinner than one; if not, it does.
  isCovered(covered, box) {
    const row = Math.max(0, Math.floor(box.top)) * CELLS;
    const first = row + Math.max(0, Math.floor(box.left / this.width * CELLS));
    const last = row + Math.min(CELLS - 1, Math.floor((box.left + box.width) / this.width * CELLS));
    let isFull = true;
    for (let at = first; at <= last; at += 1) if (!covered[at]) { isFull = false; covered[at] = 1; }
    return isFull;
  }

  ghostBars(context, ghosts) {
    context.lineWidth = 1;
    for (const { box, ghost } of ghosts) {
      const alpha = Math.max(0.12, 0.9 - (this.model.time - ghost) / FADE);
      context.fillStyle = this.faded.ghost(alpha * 0.16);
      context.fillRect(box.left, box.top, box.width, box.height);
      if (box.height < 5 || box.width < 5) continue;
      context.strokeStyle = this.faded.ghost(alpha);
      context.setLineDash([3, 3]);
      context.strokeRect(box.left + 0.5, box.top + 0.5, box.width - 1, box.height - 1);
    }
    context.setLineDash([]);
  }

  marks(context, ticks) {
    const [old, plain, dotted, lost] = [[], [], [], []];
    for (const node of ticks) {
      const { box } = node;
      const height = Math.min(box.height, 20);
      const mark = { right: box.left + box.width, top: box.top + (box.height - height) / 2, height };
      const deeper = node.saved ? node.kids.filter((kid) => kid.ghost === null) : [];
      if (!node.saved) lost.push(mark);
      else if (deeper.length === 1 && deeper[0].hasState) old.push(mark); // superseded
      else (height > 9 && box.width > 9 ? dotted : plain).push(mark);
    }
    const draw = (marks, colour, edge) => {
      context.fillStyle = colour;
      for (const { right, top, height } of marks) context.fillRect(right - 2 - edge, top, 2 + 2 * edge, height);
      if (marks === dotted) for (const { right, top, height } of marks) { context.beginPath(); context.arc(right - 1, top + height / 2, 3.2 + edge, 0, 7); context.fill(); }
    };
    draw(old, this.faded.ink(0.55), 0);
    draw(dotted, this.colour.panel, 1); // an edge, for a node that is as bright as the mark
    draw(dotted, this.colour.ink, 0);
    draw(plain, this.colour.ink, 0);
    context.fillStyle = this.colour.checkpoint_evicted;
    for (const { right, top, height } of lost) if (height > 4) for (let at = 0; at < height - 1; at += 4) context.fillRect(right - 2, top + at, 2, 2);
  }

  locks(context) {
    context.fillStyle = this.colour.lock;
    const done = new Set();
    for (const one of this.model.running()) {
      for (let at = this.model.nodes.get(one.node); at && !at.isRoot && !done.has(at); at = at.parent) {
        done.add(at);
        if (at.box) context.fillRect(at.box.left, at.box.top, at.box.width + 1, Math.min(3, at.box.height));
      }
    }
  }

  labels(context, bins) {
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "middle";
    for (const [at, nodes] of bins.entries()) {
      context.fillStyle = this.inkOn[this.by][at];
      for (const { box, start, end } of nodes) {
        if (box.height < 13 || box.width < 44) continue;
        const left = Math.max(box.left, 0) + 7;
        if (box.left + box.width - left < 34) continue;
        context.fillText(whole.format(end - start), left, box.top + box.height / 2 + 0.5);
      }
    }
  }

  outline(context, node, colour, line) {
    if (!node?.box || !this.items.includes(node)) return;
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.strokeRect(node.box.left - 0.5, node.box.top - 0.5, node.box.width + 1, node.box.height + 1);
  }

  at(x, y) {
    let found = null;
    for (const node of this.items) {
      const box = node.box;
      if (box && x >= box.left - 1 && x <= box.left + box.width + 1 && y >= box.top && y <= box.top + Math.max(box.height, 2)) found = node;
    }
    return found;
  }

  listen() {
    const canvas = this.canvas;
    const pointers = new Map();
    let [drag, spread] = [null, 0];
    const place = (event) => { const rect = canvas.getBoundingClientRect(); return [event.clientX - rect.left, event.clientY - rect.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      pointers.set(event.pointerId, place(event));
      drag = { from: place(event), shown: this.shown, moved: false };
      spread = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (pointers.has(event.pointerId)) pointers.set(event.pointerId, [x, y]);
      if (pointers.size === 2) {
        const [one, two] = [...pointers.values()];
        const now = Math.hypot(one[0] - two[0], one[1] - two[1]);
        if (spread) this.zoomBy(now / spread, (one[0] + two[0]) / 2, (one[1] + two[1]) / 2);
        spread = now;
        return;
      }
      if (drag && event.buttons) {
        if (!drag.moved && Math.hypot(x - drag.from[0], y - drag.from[1]) < 4) return;
        if (!drag.moved) { canvas.setPointerCapture(event.pointerId); this.element.classList.add("drag"); }
        drag.moved = true;
        const { shown } = drag;
        this.move({ ...shown, x: shown.x - (x - drag.from[0]) * shown.width / this.width, y: shown.y - (y - drag.from[1]) / shown.lane });
        return;
      }
      this.hover(this.at(x, y), x, y);
    });
    const end = (event) => {
      pointers.delete(event.pointerId);
      this.element.classList.remove("drag");
      if (drag && !drag.moved && event.type === "pointerup") this.view.select(this.at(...place(event)));
      drag = null;
    };
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, end);
    canvas.addEventListener("pointerleave", () => this.hover(null));
    canvas.addEventListener("dblclick", (event) => this.focusOn(this.at(...place(event))));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.shiftKey) {
        if (!this.zoom) return; // the page scrolls
        event.preventDefault();
        this.move({ ...this.shown, x: this.shown.x + event.deltaX * this.shown.width / this.width, y: this.shown.y + event.deltaY / this.shown.lane });
        return;
      }
      event.preventDefault();
      this.zoomBy(Math.exp(-(event.deltaY || event.deltaX) * 0.0022), ...place(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  hover(node, x, y) {
    if (node !== this.hovered) { this.hovered = node; this.draw(); }
    this.tip.hidden = !node;
    if (!node) return;
    this.tip.replaceChildren(...this.view.describe(node).map((line, at) => element(at ? "div" : "strong", {}, line)));
    const left = Math.min(x + 14, this.width - 215);
    Object.assign(this.tip.style, { left: `${Math.max(left, 4)}px`, top: y > this.height - 120 ? "" : `${y + 14}px`, bottom: y > this.height - 120 ? `${this.height - y + 10}px` : "" });
  }

  move(shown) {
    const width = Math.max(16, Math.min(shown.width, this.deepest * 1.03));
    const room = (this.height - AXIS - 6) / shown.lane;
    this.zoom = {
      width, lane: Math.max(0.02, Math.min(shown.lane, 60)),
      x: Math.max(0, Math.min(shown.x, this.deepest * 1.03 - width)),
      y: Math.max(0, Math.min(shown.y, this.lanes - room)),
    };
    const fit = Math.min(LANE, (this.height - AXIS - 6) / this.lanes);
    if (width >= this.deepest * 1.029 && this.zoom.lane <= fit * 1.001) this.zoom = null;
    this.draw();
  }

  zoomBy(factor, x = this.width / 2, y = this.height / 2) {
    const shown = this.shown;
    const width = shown.width / factor;
    const fit = Math.min(LANE, (this.height - AXIS - 6) / this.lanes);
    const lane = Math.max(fit, Math.min(fit < LANE ? shown.lane * factor : shown.lane, LANE));
    const token = shown.x + x * shown.width / this.width;
    const row = shown.y + (y - AXIS - 4) / shown.lane;
    this.move({ width, lane, x: token - x * width / this.width, y: row - (y - AXIS - 4) / lane });
  }

  focusOn(node) {
    if (!node) { this.zoom = null; this.draw(); return; }
    const width = Math.max((node.end - node.start) * 1.6, 64);
    const lane = Math.max(this.shown.lane, Math.min(LANE, (this.height - AXIS) / (node.y1 - node.y0 + 2)));
    this.move({ width, lane, x: node.start - width * 0.2, y: node.y0 - 1 });
  }

  reveal(node) {
    const box = node.box;
    if (box && box.left + box.width > 0 && box.left < this.width && box.top > AXIS - 1 && box.top < this.height - 6) return;
    this.move({ ...this.shown, x: node.start - this.shown.width * 0.1, y: node.y0 - 2 });
  }

  // Arrows walk the tree: right to a child, left to the parent, up and down between branches.
  key(event) {
    const to = {
      ArrowRight: (node) => node.kids[0], ArrowLeft: (node) => (node.parent.isRoot ? null : node.parent),
      ArrowDown: (node) => this.beside(node, 1), ArrowUp: (node) => this.beside(node, -1),
      Home: () => this.items[0], End: () => this.items.at(-1),
    }[event.key];
    if (to) {
      const node = this.selected ? to(this.selected) : this.items[0];
      if (node) { this.view.select(node); this.reveal(node); }
    } else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
    else if (event.key === "-") this.zoomBy(1 / 1.4);
    else if (event.key === "0") { this.zoom = null; this.draw(); }
    else if (event.key === "Enter" && this.selected) this.focusOn(this.selected);
    else if (event.key === "Escape") this.view.select(null);
    else return;
    event.preventDefault();
  }

  beside(node, step) {
    const kids = node.parent.kids;
    const near = kids[kids.indexOf(node) + step];
    if (near) return near;
    const row = step > 0 ? node.y1 + 0.6 : node.y0 - 0.6;
    return this.items.find((one) => one.y0 <= row && row <= one.y1 && one.end > node.start);
  }
}
