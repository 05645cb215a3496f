// What is known of the node or the request that was chosen.
class Details {
  constructor(view, ask = null) {
    this.view = view;
    this.ask = ask; // (path) => Promise of JSON, where there is a server
    this.title = element("h2", {}, "Details");
    this.body = element("div.body");
    const close = element("button.quiet", { type: "button", onclick: () => this.view.select(null) }, "close");
    this.element = element("section.card.details", { "aria-label": "Details" }, element("header", {}, this.title, element("div.tools", {}, close)), this.body);
    this.hint();
  }

  hint() {
    this.element.classList.add("hint");
    this.title.textContent = "Details";
    this.body.replaceChildren(element("p.soft", {}, "Choose a node of the tree, or a request's bar."));
  }

  facts(pairs) {
    return element("dl.facts", {}, ...pairs.filter(([, value]) => value !== null).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  }

  node(node) {
    this.element.classList.remove("hint");
    const { model } = this.view;
    const cost = model.cost(node);
    const state = node.saved ? `checkpoint${node.saved.label ? ` (${node.saved.label})` : ""}` : node.lost ? "checkpoint evicted" : "none at its end";
    this.title.textContent = node.ghost !== null ? "Ghost" : `Node ${whole.format(node.start)}–${whole.format(node.end)}`;
    const text = element("pre.text", { hidden: true, tabindex: 0 });
    const exact = element("div");
    const pairs = [
      ["tokens", `${whole.format(node.start)}–${whole.format(node.end)}, ${count(node.end - node.start, "token")}`],
      node.ghost !== null ? ["KV", `evicted ${ago(model.time - node.ghost)}; its tokens are remembered`] : ["KV", size(cost.kvBytes)],
      ["state", model.meta.state_bytes ? state : null],
      ["resumed through it", count(node.hits ?? node.uses, "request")],
      ["last used", ago(model.time - (node.recent ?? node.last))],
      ["namespace", node.namespace === null ? null : `tenant ${tenant(node.namespace)}`],
    ];
    if (node.ghost === null) pairs.push(["evicting it frees", cost.isLeaf ? size(cost.kvBytes + cost.stateBytes) : node.saved ? `${size(cost.stateBytes)}, its state` : "nothing: nodes below need its KV"], ["then to compute again", count(cost.recompute, "token")]);
    this.body.replaceChildren(this.facts(pairs), exact, this.talks(model.users(node)), text);
    if (this.ask && node.ghost === null) this.asked(node, text, exact);
  }

  talks(users) {
    if (!users.size) return element("p.soft", {}, "No request that is shown used it.");
    const chips = [...users].slice(-24).map(([talk, times]) => element("button", { type: "button", title: count(times, "request"), onclick: () => this.view.selectRequest(this.view.model.talks.get(talk)?.ids.at(-1)) }, typeof talk === "number" ? `#${talk}` : talk));
    return element("div", {}, element("p.soft", {}, `Used by ${count(users.size, "conversation")}`), element("div.chips", {}, ...chips));
  }

  async asked(node, text, exact) {
    const { id } = node;
    try {
      const found = await this.ask(`/v1/cache/nodes/${id}${location.search}`);
      if (this.view.tree.selected !== node) return;
      const pairs = [["frees, with KV above it that nothing else needs", size(found.frees_bytes)], ["locked by", found.locks ? count(found.locks, "request") : null], ["in the arena", found.slabs.length ? count(found.slabs.length, "slab") : null]];
      exact.replaceChildren(this.facts(pairs));
      this.view.strip.mark([...found.slabs, ...(node.saved ? [node.saved.slot] : [])]);
      text.hidden = false;
      text.textContent = found.text === null ? "A tenant's text (cache_salt) is not shown." : `${found.is_cut ? "… " : ""}${found.text}`;
    } catch (error) {
      exact.replaceChildren(element("p.soft", {}, error.message));
    }
  }

  request(one) {
    this.element.classList.remove("hint");
    this.title.textContent = `Request ${one.id.replace(/^\w+-/, "").slice(0, 12)}`;
    this.title.title = one.id;
    const items = one.losses ? [["hit", "reused", TERMS.reused, one.cached], ...CAUSES.map(([name, label, said]) => [name, label, said, one.losses[name]])] : [];
    const why = element("ul.why", {}, ...items.filter(([, , , tokens]) => tokens).map(([name, label, said, tokens]) => element("li", {}, element("i", { style: `background: var(--${name})` }), element("b", {}, whole.format(tokens)), element("span", {}, `${label} · ${percent(tokens, one.prompt)}`), element("em", {}, said))));
    const rate = speed(one);
    const queue = one.scheduled_s === null ? null : one.scheduled_s - one.arrived_s;
    const node = this.view.model.nodes.get(one.node);
    const missed = element("div.missed");
    this.body.replaceChildren(
      element("div.missed", {}, element("h3", {}, "Where its prompt tokens came from"), why), missed,
      this.facts([
        ["prompt", count(one.prompt, "token")], ["reused", percent(one.cached, one.prompt)], ["answer", count(one.answer, "token")], [GOING.has(one.state) ? "state" : "ended by", one.state === "stop" ? "stop: its end, or calls of tools" : one.state],
        ["waited", queue === null ? null : seconds(queue)], ["time to first token", seconds(one.first_token_s === null ? null : one.first_token_s - one.arrived_s)], ["tokens a second", rate ? rate.toFixed(1) : null],
        ["preempted", one.preemptions ? count(one.preemptions, "time") : null], ["namespace", one.namespace === null ? null : `tenant ${tenant(one.namespace)}`],
      ]),
      ...(node ? [element("p", {}, element("button.plain", { type: "button", onclick: () => { this.view.select(node); this.view.tree.reveal(node); } }, "Show in the tree"))] : []),
    );
    this.explained(one, missed);
  }

  // Why it missed, compared with the earlier request that shares most, if the server remembers both.
  async explained(one, place) {
    if (!this.ask || !one.losses) return;
    let found;
    try {
      found = await this.ask(`/v1/cache/explanations/${encodeURIComponent(one.id.replace(/#\d+$/, ""))}`);
    } catch { return; } // The causes above are all that is known.
    if (!place.isConnected || !found.text) return;
    const other = this.view.model.requests.has(found.compared_with) ? [element("p", {}, element("button.plain", { type: "button", onclick: () => this.view.selectRequest(found.compared_with) }, "Show the earlier request"))] : [];
    const parts = [element("h3", {}, "Why it missed"), ...(found.compared_with ? [element("p.soft", {}, `Compared with the earlier request that shares the most (${count(found.shared_tokens, "token")}):`)] : []), element("p", {}, found.text)];
    const { parted } = found;
    if (parted?.before != null) {
      parts.push(element("pre.text", { tabindex: 0, "aria-label": "Where the prompts part" }, element("span.soft", {}, `… ${parted.before}`), ...(parted.was ? [element("del", {}, parted.was)] : []), ...(parted.now ? [element("ins", {}, parted.now)] : [])));
    }
    place.replaceChildren(...parts, ...other);
  }
}
