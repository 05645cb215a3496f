// The same tree as a table, for screen readers and for whoever likes numbers.
const MAX_ROWS = 400;

class TreeTable {
  constructor(view) {
    this.view = view;
    this.body = element("tbody");
    this.more = element("p.empty", { hidden: true });
    const head = ["tokens", "length", "state at its end", "KV", "hits", "last used"].map((name) => element("th", { scope: "col" }, name));
    this.element = element("div.table", { hidden: true }, element("table", { role: "treegrid", "aria-label": "Tree of cached prefixes" }, element("thead", {}, element("tr", {}, ...head)), this.body), this.more);
    this.body.addEventListener("click", (event) => this.choose(event.target.closest("tr")));
    this.body.addEventListener("keydown", (event) => {
      const row = event.target.closest("tr");
      const to = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
      if (to) { to.focus(); this.choose(to); event.preventDefault(); }
      if (event.key === "Enter") this.choose(row);
    });
  }

  choose(row) {
    if (row) this.view.select(this.nodes[[...this.body.children].indexOf(row)]);
  }

  update() {
    if (this.element.hidden) return;
    const { model, tree } = this.view;
    this.nodes = tree.items.slice(0, MAX_ROWS);
    const focused = [...this.body.children].indexOf(document.activeElement);
    const [depth, forks] = [new Map(), new Map()]; // only a fork is indented, as in the outline
    this.body.replaceChildren(...this.nodes.map((node) => {
      const level = node.parent.isRoot ? 1 : depth.get(node.parent) + 1;
      depth.set(node, level);
      forks.set(node, level === 1 ? 0 : forks.get(node.parent) + (node.parent.kids.length > 1 ? 1 : 0));
      const state = node.ghost !== null ? "ghost" : node.saved ? `checkpoint ${node.saved.slot ?? ""}${node.saved.label ? ` · ${node.saved.label}` : ""}` : node.lost ? "checkpoint evicted" : node.hasState || !model.meta.state_bytes ? "–" : "KV without a state";
      const cells = [
        element("td", { style: `padding-left: ${12 + 14 * Math.min(forks.get(node), 12)}px` }, `${whole.format(node.start)}–${whole.format(node.end)}`),
        ...[whole.format(node.end - node.start), state, node.ghost !== null ? "–" : size((node.end - node.start) * model.meta.kv_bytes), whole.format(node.hits), ago(model.time - node.recent)].map((text) => element("td", {}, text)),
      ];
      return element("tr", { role: "row", tabindex: node === tree.selected || (!tree.selected && node === this.nodes[0]) ? 0 : -1, "aria-level": level, "aria-selected": node === tree.selected }, ...cells);
    }));
    if (focused >= 0) this.body.children[focused]?.focus();
    const left = tree.items.length - this.nodes.length;
    this.more.hidden = left <= 0;
    this.more.textContent = `${whole.format(left)} more in the picture`;
  }
}

function ago(requests) {
  return requests <= 0 ? "now" : `${count(requests, "request")} ago`;
}
