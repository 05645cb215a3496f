// The server's side: changes as they come, reconnecting for as long as the page is open.
const RETRY_S = [0.3, 1, 2, 4, 8];
const SILENT_MS = 25000; // The server says something every second.

// {event, id, data} of a stream of server-sent events.
async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, one] = ["", { event: "message", id: null, data: null }];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (one.data !== null) yield one;
          else yield { event: "alive", id: null, data: "" };
          one = { event: "message", id: null, data: null };
        } else if (line.startsWith("data: ")) one.data = one.data === null ? line.slice(6) : `${one.data}\n${line.slice(6)}`;
        else if (line.startsWith("event: ")) one.event = line.slice(7);
        else if (line.startsWith("id: ")) one.id = line.slice(4);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

class Live {
  constructor(main) {
    this.main = main;
    this.link = document.getElementById("link");
    this.last = null;
    this.tries = 0;
    this.view = new View(new Model(), { ask: (path) => this.json(path) });
    this.chat = new Chat((path, options) => this.ask(path, options));
    main.className = "live";
    main.append(this.view.element, element("div.aside", {}, this.view.details.element, this.chat.element));
    this.view.tree.note.hidden = false;
    this.load();
    this.follow();
  }

  load() {
    this.view.tree.note.replaceChildren(element("strong", {}, "Loading the cache …"));
  }

  async ask(path, options = {}) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    let [message, isOwn] = [`The server answered ${response.status}.`, true];
    try { message = (await response.json()).error.message; } catch { isOwn = false; /* no JSON: the number says it */ }
    throw Object.assign(new Error(message), { status: response.status, isOwn });
  }

  async json(path) { return (await this.ask(path)).json(); }

  async follow() {
    for (;;) {
      const stop = new AbortController();
      let timer = null;
      const listen = () => { clearTimeout(timer); timer = setTimeout(() => stop.abort(), SILENT_MS); };
      let reason = "The connection broke off";
      if (!this.view.model.meta.title) this.load();
      try {
        listen();
        const response = await this.ask(`/v1/cache/events${location.search}`, { signal: stop.signal });
        this.tries = 0;
        for await (const one of serverEvents(response.body)) {
          listen();
          if (one.event === "ended") { reason = JSON.parse(one.data); break; }
          if (one.event === "busy") this.busy(JSON.parse(one.data));
          else if (one.event !== "alive") this.take(one);
        }
      } catch (error) {
        const isRefused = error.status === 401 || error.status === 403;
        if (isRefused && error.isOwn) { await this.askForKey(error); continue; }
        if (error.status) reason = isRefused ? "A proxy denies /v1/cache: open the page on the server" : error.message;
      } finally { clearTimeout(timer); }
      await this.pause(reason);
    }
  }

  // Links to the replicas of this server, if there are several.
  choose({ replica, num_replicas: many = 1 }) {
    const place = document.getElementById("replicas");
    place.hidden = many < 2;
    const links = Array.from({ length: many }, (_, i) => element("a", { href: `?replica=${i + 1}`, ...(i + 1 === replica ? { "aria-current": "page" } : {}) }, `${i + 1}`));
    place.replaceChildren("replica ", ...links.flatMap((link) => [link, " "]));
  }

  take({ event, data }) {
    const message = JSON.parse(data);
    if (event === "whole") {
      const model = new Model(message.meta);
      for (const record of message.records) model.apply(record, true);
      document.getElementById("title").textContent = [message.meta.version, message.meta.title].filter(Boolean).join(" · ");
      this.choose(message.meta);
      document.title = `${message.meta.title} · hybridcache`;
      this.chat.serve(message.meta.title, message.meta.model);
      this.view.show(model);
    } else {
      for (const record of message.records) this.view.model.apply(record);
      this.later();
    }
    const going = this.view.model.running().filter((one) => one.state === "prefill");
    const sum = (name) => going.reduce((total, one) => total + one[name], 0);
    this.busy({ num_prefilled: sum("computed"), num_to_prefill: sum("prompt") });
    this.main.classList.remove("stale");
  }

  // The server answers, and its engine may be in a long step.
  busy({ num_prefilled: done, num_to_prefill: all }) {
    const text = all ? `computing a prompt, ${Math.floor((100 * done) / all)} %` : "live";
    this.say(this.view.model.meta.title ? "live" : "loading", this.view.model.meta.title || all ? text : "waiting for the engine");
  }

  // At most one update a frame, however many changes come.
  later() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => { this.due = false; this.view.update(); this.view.refresh(); });
  }

  say(state, text) {
    if (this.link.dataset.state === state && this.link.textContent === text) return;
    this.link.dataset.state = state;
    this.link.textContent = text;
  }

  async pause(reason) {
    reason = reason.replace(/\.$/, "");
    const wait = RETRY_S[Math.min(this.tries, RETRY_S.length - 1)];
    this.tries += 1;
    if (this.tries === 1 && (await fetch("/health").catch(() => null))?.ok) { this.say("loading", "connecting again"); return; }
    this.main.classList.add("stale");
    this.say("broken", `${reason}; trying again${wait >= 2 ? ` in ${wait} s` : ""}`);
    if (!this.view.tree.items.length) this.view.tree.note.replaceChildren(element("strong", {}, "No connection"), element("span", {}, `${reason}. The page goes on as soon as the server answers.`));
    await new Promise((done) => { setTimeout(done, 1000 * wait); addEventListener("online", done, { once: true }); });
  }

  askForKey(error) {
    this.say("broken", "not allowed");
    const input = element("input", { type: "password", "aria-label": "Key", placeholder: "key", autocomplete: "off" });
    this.view.tree.note.replaceChildren(element("strong", {}, "Locked"), element("span", {}, "Enter the key above to see the cache."));
    const said = "The cache is shown to operators only. Enter a key of --admin-key-file (or of --api-key-file if there is no other). It is kept until this tab is closed.";
    const refused = error.status === 403 ? error.message : "The server did not accept this key.";
    const wrong = sessionStorage.getItem("key") ? [element("p.alarm", { role: "alert" }, refused)] : [];
    const form = element("form.key.card", { title: error.message }, element("p", {}, said), input, element("button.main", {}, "Open"), ...wrong);
    this.view.element.prepend(form);
    input.focus();
    return new Promise((done) => form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem("key", input.value.trim());
      form.remove();
      this.say("loading", "connecting");
      done();
    }));
  }
}
