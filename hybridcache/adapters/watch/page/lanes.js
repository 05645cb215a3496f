// A lane for each conversation, a bar for each request: what was reused, and why the rest was not.
const MAX_LANES = 80;
const MAX_BARS = 40;
const MIN_BAR = 10;
const MIN_RATED_S = 0.25; // In less time, the gap between two reads decides.

class Lanes {
  constructor(view) {
    this.view = view;
    this.rows = new Map();
    this.list = element("ul.lanes");
    this.empty = element("p.empty");
    this.more = element("span.soft");
    this.title = element("h2", {}, "Conversations");
    this.filter = element("input.filter", { type: "search", placeholder: "filter by number, tenant or id", "aria-label": "Show only conversations whose number, tenant or request contains this", oninput: () => this.update() });
    this.element = element("section.card", { "aria-label": "Conversations" }, element("header", {}, this.title, this.more, element("div.tools", {}, this.filter)), this.list, this.empty, this.legend());
    this.list.addEventListener("click", (event) => {
      const bar = event.target.closest(".bar");
      if (bar) this.view.selectRequest(bar.dataset.id);
    });
    this.list.addEventListener("keydown", (event) => this.key(event));
  }

  legend() {
    return element("div.legend", {}, ...[["hit", "reused"], ...CAUSES].map(([name, label]) => key(swatch(`var(--${name})`), label)));
  }

  update() {
    const model = this.view.model;
    const wanted = this.filter.value.trim().toLowerCase();
    const talks = [...model.talks.values()].reverse().filter((talk) => !wanted || matches(talk, wanted));
    const shown = talks.slice(0, MAX_LANES);
    const all = shown.map((talk) => talk.ids.slice(-MAX_BARS).map((id) => model.requests.get(id)));
    const longest = Math.max(64, ...all.map((requests) => requests.reduce((sum, one) => sum + one.prompt, 0)));
    const room = Math.max(120, (this.list.clientWidth || 600) - (innerWidth <= 560 ? 26 : innerWidth <= 1020 ? 344 : 350));
    const scale = Math.min(room / longest, 0.5);
    this.empty.hidden = talks.length > 0;
    this.empty.textContent = model.talks.size ? "No conversation matches." : model.meta.title ? "No request yet." : "";
    this.list.hidden = talks.length === 0;
    this.more.textContent = talks.length > MAX_LANES ? `the latest ${MAX_LANES} of ${whole.format(talks.length)}` : talks.length ? whole.format(talks.length) : "";
    const rows = new Map();
    let before = null;
    for (const [at, talk] of shown.entries()) {
      const row = this.rows.get(talk.id) ?? this.row(talk);
      rows.set(talk.id, row);
      this.fill(row, talk, all[at], scale);
      const following = before ? before.element.nextSibling : this.list.firstChild;
      if (following !== row.element) this.list.insertBefore(row.element, following);
      before = row;
    }
    for (const [id, row] of this.rows) if (!rows.has(id)) row.element.remove();
    this.rows = rows;
  }

  row(talk) {
    const of = talk.namespace === null ? "" : ` · ${tenant(talk.namespace)}`;
    const name = typeof talk.id === "string" ? talk.id : `#${talk.id}${of}`;
    const who = element("span.who", { title: `conversation ${talk.id}${talk.namespace === null ? "" : `, tenant ${talk.namespace}`}` }, name);
    const bars = element("div.bars");
    const last = element("span.last");
    return { element: element("li.lane", {}, who, bars, last), who, name, bars, last, drawn: new Map() };
  }

  fill(row, talk, requests, scale) {
    const chosen = this.view.selectedRequest;
    const hidden = talk.ids.length - requests.length;
    row.who.textContent = hidden ? `${row.name} · ${hidden} …` : row.name;
    row.bars.title = hidden ? `${count(hidden, "earlier request")} not shown` : "";
    const drawn = new Map();
    let before = null;
    for (const one of requests) {
      const isOn = one.id === chosen;
      const state = `${one.state} ${one.computed} ${one.cached} ${scale.toFixed(4)} ${isOn}`;
      let bar = row.drawn.get(one.id);
      if (!bar) { bar = { element: element("button.bar", { type: "button", "data-id": one.id }), state: "" }; }
      if (bar.state !== state) { this.bar(bar.element, one, scale, isOn); bar.state = state; }
      drawn.set(one.id, bar);
      const following = before ? before.nextSibling : row.bars.firstChild;
      if (following !== bar.element) row.bars.insertBefore(bar.element, following);
      before = bar.element;
    }
    for (const [id, bar] of row.drawn) if (!drawn.has(id)) bar.element.remove();
    row.drawn = drawn;
    const latest = requests.at(-1);
    row.last.textContent = latest ? this.told(latest) : "";
  }

  told(one) {
    if (one.state === "waiting") return "waiting";
    if (one.state === "prefill") return `prefill ${percent(one.computed, one.prompt)}`;
    if (one.state === "decode") return `${count(one.answer, "token")}${one.rate ? ` · ${digits(one.rate)} tok/s` : ""}`;
    const parts = [`${percent(one.cached, one.prompt)} hit`];
    if (one.first_token_s !== null) parts.push(seconds(one.first_token_s - one.arrived_s));
    const rate = speed(one);
    if (rate) parts.push(`${digits(rate)} tok/s`);
    return parts.join(" · ");
  }

  bar(bar, one, scale, isOn) {
    const isRunning = GOING.has(one.state);
    const parts = [];
    const add = (name, tokens) => { if (tokens > 0) parts.push(element(name === "rest" ? "i.rest" : "i", { style: `width: ${((100 * tokens) / one.prompt).toFixed(2)}%;${name === "rest" ? "" : ` background: var(--${name})`}` })); };
    if (one.losses) {
      add("hit", one.cached);
      for (const [cause] of CAUSES) add(cause, one.losses[cause]);
    } else add("rest", one.prompt);
    bar.className = `bar${isRunning ? " running" : ""}${one.state === "error" ? " bad" : ""}`;
    bar.style.width = `${Math.max(one.prompt * scale, MIN_BAR).toFixed(2)}px`;
    bar.setAttribute("aria-pressed", isOn);
    bar.setAttribute("aria-label", `${count(one.prompt, "token")}, ${percent(one.cached, one.prompt)} reused, ${one.state}`);
    bar.title = `${count(one.prompt, "token")} · ${percent(one.cached, one.prompt)} reused · TTFT ${seconds(one.first_token_s === null ? null : one.first_token_s - one.arrived_s)}`;
    bar.replaceChildren(...parts);
  }

  key(event) {
    const bar = event.target.closest(".bar");
    if (!bar) return;
    const lane = bar.closest(".lane");
    const to = {
      ArrowRight: () => bar.nextElementSibling, ArrowLeft: () => bar.previousElementSibling,
      ArrowDown: () => lane.nextElementSibling?.querySelector(".bar:last-child"),
      ArrowUp: () => lane.previousElementSibling?.querySelector(".bar:last-child"),
    }[event.key]?.();
    if (!to) return;
    event.preventDefault();
    to.focus();
  }
}

// Whether a conversation's number, tenant or one of its requests contains the text.
function matches(talk, wanted) {
  return [`#${talk.id}`, talk.namespace ?? "", ...talk.ids].some((text) => String(text).toLowerCase().includes(wanted));
}

const digits = (rate) => rate.toFixed(rate < 10 ? 1 : 0);

// Tokens a second after the first; null where there were not two.
function speed(one) {
  const spent = one.finished_s !== null && one.first_token_s !== null ? one.finished_s - one.first_token_s : 0;
  return one.answer > 1 && spent >= MIN_RATED_S ? (one.answer - 1) / spent : null;
}
