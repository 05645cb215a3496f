// One cache as its records tell of it. README.md of hybridcache/adapters/watch describes the records.
const MAX_GHOSTS = 1500;
const RATED_S = 1; // The rate of a running answer is that of its latest second, or step.
const FADE = 32; // A ghost is gone from the picture after so many requests.
const GOING = new Set(["waiting", "prefill", "decode"]); // Every other state is why a request ended.

class Model {
  constructor(meta = {}) {
    this.meta = meta;
    this.roots = new Map();
    this.nodes = new Map();
    this.ghosts = new Set();
    this.requests = new Map();
    this.talks = new Map();
    this.clock = 0;
    this.time = 0;
    this.memory = null;
    this.slabs = null;
    this.tokens = { prompt: 0, cached: 0 };
    this.treeVersion = 0;
    this.requestVersion = 0;
  }

  apply(record, isPast = false) {
    const [kind, ...rest] = record;
    if (kind === "time") { [this.clock, this.time] = rest; this.fade(); }
    else if (kind === "kv") this.store(rest);
    else if (kind === "split") this.split(rest);
    else if (kind === "kv-gone") this.drop(rest[0]);
    else if (kind === "checkpoint") this.save(rest);
    else if (kind === "checkpoint-gone") this.lose(rest[0]);
    else if (kind === "request") this.request(rest[0], isPast);
    else if (kind === "memory") { this.memory = rest[0]; this.requestVersion += 1; }
    else if (kind === "slabs") { this.slabs = { percent: rest[0], states: new Set(rest[1]), each: rest[2] }; this.requestVersion += 1; }
  }

  root(namespace) {
    let root = this.roots.get(namespace);
    if (!root) {
      root = { id: null, namespace, start: 0, end: 0, parent: null, kids: [], isRoot: true };
      this.roots.set(namespace, root);
    }
    return root;
  }

  store([id, parentId, namespace, start, end, key, uses, last]) {
    const parent = this.nodes.get(parentId) ?? this.root(namespace);
    const node = { id, namespace, start, end, key, uses, last, parent, kids: [], saved: null, lost: false, ghost: null, isNew: true };
    const ghost = parent.kids.find((kid) => kid.ghost !== null && kid.key === key);
    if (ghost) this.revive(ghost, node);
    parent.kids.push(node);
    this.nodes.set(id, node);
    this.treeVersion += 1;
  }

  revive(ghost, node) {
    this.ghosts.delete(ghost);
    ghost.parent.kids.splice(ghost.parent.kids.indexOf(ghost), 1);
    const below = ghost.end > node.end ? [ghost] : ghost.end === node.end ? ghost.kids : [];
    if (below[0] === ghost) { ghost.start = node.end; ghost.key = null; this.ghosts.add(ghost); }
    for (const kid of below) { kid.parent = node; node.kids.push(kid); }
    if (ghost.end < node.end) for (const kid of ghost.kids) this.forget(kid);
    if (ghost.end === node.end) node.lost = ghost.lost;
  }

  forget(ghost) {
    const waiting = [ghost];
    for (let one; (one = waiting.pop());) { this.ghosts.delete(one); waiting.push(...one.kids); }
  }

  split([id, upperId, position, key]) {
    const lower = this.nodes.get(id);
    if (!lower) return;
    const upper = { ...lower, id: upperId, end: position, uses: 0, kids: [lower], saved: null, lost: false, isNew: false, box: null };
    lower.parent.kids[lower.parent.kids.indexOf(lower)] = upper;
    Object.assign(lower, { start: position, key, parent: upper });
    this.nodes.set(upperId, upper);
    this.treeVersion += 1;
  }

  drop(id) {
    const node = this.nodes.get(id);
    if (!node) return;
    this.nodes.delete(id);
    node.ghost = this.time;
    this.ghosts.add(node);
    if (!node.parent.isRoot) {
      node.parent.uses += node.uses;
      node.parent.last = Math.max(node.parent.last, node.last);
    }
    this.treeVersion += 1;
  }

  save([id, slot, label, uses, last]) {
    const node = this.nodes.get(id);
    if (!node) return;
    node.saved = { slot, label, uses, last };
    node.lost = false;
    this.treeVersion += 1;
  }

  lose(id) {
    const node = this.nodes.get(id);
    if (!node) return;
    node.saved = null;
    node.lost = true;
    this.treeVersion += 1;
  }

  fade() {
    for (const ghost of this.ghosts) {
      if (this.ghosts.size <= MAX_GHOSTS && this.time - ghost.ghost <= FADE) break; // oldest first
      if (ghost.parent.kids.includes(ghost)) ghost.parent.kids.splice(ghost.parent.kids.indexOf(ghost), 1);
      this.forget(ghost);
      if (ghost.parent.isRoot && !ghost.parent.kids.length) this.roots.delete(ghost.namespace);
      this.treeVersion += 1;
    }
  }

  request(data, isPast) {
    const known = this.requests.get(data.id);
    const one = { ...data, isCounted: known?.isCounted ?? false, since: known?.since ?? [this.clock, data.answer], rate: known?.rate ?? null };
    const [clock, answer] = one.since;
    if (this.clock - clock >= RATED_S) { one.rate = (data.answer - answer) / (this.clock - clock); one.since = [this.clock, data.answer]; }
    this.requests.set(data.id, one);
    if (!one.isCounted && data.state !== "waiting" && data.scheduled_s !== null) {
      one.isCounted = true;
      if (!isPast && data.cached) this.use(data);
      if (!this.memory) { this.tokens.prompt += data.prompt; this.tokens.cached += data.cached; }
    }
    let talk = this.talks.get(data.conversation);
    if (talk) this.talks.delete(data.conversation); // the latest stand last
    else talk = { id: data.conversation, namespace: data.namespace, ids: [] };
    this.talks.set(data.conversation, talk);
    if (!known) talk.ids.push(data.id);
    if (this.requests.size > 4000) this.trim();
    this.requestVersion += 1;
  }

  trim() {
    const [id, oldest] = this.requests.entries().next().value;
    this.requests.delete(id);
    const talk = this.talks.get(oldest.conversation);
    talk.ids.splice(talk.ids.indexOf(id), 1);
    if (!talk.ids.length) this.talks.delete(oldest.conversation);
  }

  use(data) {
    let node = this.nodes.get(data.node);
    while (node && !node.isRoot && node.end > data.cached) node = node.parent;
    if (!node || node.isRoot || node.end !== data.cached) return;
    node.uses += 1;
    node.last = this.time;
    if (node.saved) { node.saved.uses += 1; node.saved.last = this.time; }
    this.treeVersion += 1;
  }

  running() {
    return [...this.requests.values()].filter((one) => GOING.has(one.state));
  }

  // The nodes from the root down to one, without the root.
  path(node) {
    const path = [];
    for (let at = node; at && !at.isRoot; at = at.parent) path.unshift(at);
    return path;
  }

  users(node) {
    const inside = new Set();
    const waiting = [node];
    for (let one; (one = waiting.pop());) { if (one.id !== null) inside.add(one.id); waiting.push(...one.kids); }
    const talks = new Map();
    for (const one of this.requests.values()) {
      if (one.node !== null && inside.has(one.node)) talks.set(one.conversation, (talks.get(one.conversation) ?? 0) + 1);
    }
    return talks;
  }

  // What goes with a node, and what it takes to compute again: as the cache's own items count it.
  cost(node) {
    const { kv_bytes: kv, state_bytes: state } = this.meta;
    let above = node.parent;
    while (above && !above.isRoot && !above.saved) above = above.parent;
    const recompute = state ? node.end - (above ? above.end : 0) : node.end - node.start;
    const isLeaf = !node.kids.some((kid) => kid.ghost === null);
    return { recompute, isLeaf, kvBytes: (node.end - node.start) * kv, stateBytes: node.saved ? state : 0 };
  }
}
