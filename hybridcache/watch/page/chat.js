// Prompts that the built-in model solves, too.
const EXAMPLES = [
  "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?",
  "Kira starts with 6 pens. Then Kira gets 3 times as many. How many pens does Kira have now?",
  "Leo has 10 eggs. Leo finds 5 eggs in a basket. Leo loses 3 eggs. How many eggs does Leo have now?",
];

// A box to try things: one conversation with the model that is served.
class Chat {
  constructor(ask) {
    this.ask = ask; // (path, options) => Response
    this.messages = [];
    this.log = element("div.log", { role: "log", "aria-label": "Conversation" }, ...this.start());
    this.input = element("textarea", { rows: 1, placeholder: "Message", "aria-label": "Message" });
    this.button = element("button.main", {}, "Send");
    const form = element("form", {}, this.input, this.button);
    form.addEventListener("submit", (event) => { event.preventDefault(); if (this.stop) this.stop.abort(); else this.send(); });
    this.input.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!this.stop) this.send(); } });
    this.system = element("textarea", { rows: 1, placeholder: "System prompt", "aria-label": "System prompt", onchange: () => this.reset() });
    this.temperature = element("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "default", "aria-label": "Temperature" });
    const settings = element("details", {}, element("summary.soft", {}, "settings"), this.system, element("label.soft", {}, "temperature ", this.temperature));
    const fresh = element("button.quiet", { type: "button", onclick: () => this.reset() }, "new");
    this.element = element("section.card.chat", { "aria-label": "Chat" }, element("header", {}, element("h2", {}, "Chat"), element("div.tools", {}, fresh)), this.log, settings, form);
  }

  // The empty conversation: what to do, and prompts to choose.
  start() {
    const prompts = EXAMPLES.map((text) => element("button.plain", { type: "button", onclick: () => { this.input.value = text; this.send(); } }, text));
    return [element("p.soft", {}, "Send a message: the page shows how much of it is reused. For example:"), ...prompts];
  }

  reset() {
    this.stop?.abort();
    this.messages = [];
    this.log.replaceChildren(...this.start());
    this.input.focus();
  }

  say(role, text) {
    if (!this.messages.length) this.log.replaceChildren();
    const said = element(`div.said.${role}`, {}, text);
    this.log.append(said);
    this.log.scrollTop = this.log.scrollHeight;
    return said;
  }

  async send() {
    const text = this.input.value.trim();
    if (!text) return;
    this.input.value = "";
    this.say("user", text);
    const messages = this.messages;
    const system = this.system.value.trim();
    if (!messages.length && system) messages.push({ role: "system", content: system });
    messages.push({ role: "user", content: text });
    const temperature = this.temperature.value === "" ? {} : { temperature: Number(this.temperature.value) };
    const answer = this.say("assistant", "…");
    this.stop = new AbortController();
    this.button.textContent = "Stop";
    const began = performance.now();
    let [first, content, usage] = [null, "", null];
    try {
      const response = await this.ask("/v1/chat/completions", { method: "POST", signal: this.stop.signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ messages, ...temperature, stream: true, max_tokens: 512, stream_options: { include_usage: true } }) });
      for await (const { data } of serverEvents(response.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const delta = chunk.choices[0]?.delta ?? {};
        const more = delta.content ?? "";
        if (!more && !delta.reasoning_content) continue;
        first ??= performance.now() - began;
        content += more;
        answer.firstChild.data = content || "thinking …";
        this.log.scrollTop = this.log.scrollHeight;
      }
      if (!content) answer.firstChild.data = "(an empty answer)";
      if (usage) answer.append(this.told(usage, first, performance.now() - began));
    } catch (error) {
      if (error.name !== "AbortError") answer.firstChild.data = error.message;
    }
    if (content) messages.push({ role: "assistant", content });
    else messages.pop(); // Refused or not answered: the next message would be refused, too.
    this.stop = null;
    this.button.textContent = "Send";
  }

  told(usage, first, all) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const rate = usage.completion_tokens > 1 ? `${((usage.completion_tokens - 1) / ((all - first) / 1000)).toFixed(0)} tok/s` : null;
    return element("small", {}, [`${whole.format(cached)} of ${whole.format(usage.prompt_tokens)} reused`, `TTFT ${seconds(first / 1000)}`, rate].filter(Boolean).join(" · "));
  }
}
