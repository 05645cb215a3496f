// Prompts for any model, and those that the built-in model solves.
const EXAMPLES = ["What is a prefix cache? Answer in two sentences.", "Write a haiku about memory.", "Which is larger, 9.11 or 9.9?"];
const BUILTIN_EXAMPLES = [
  "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?",
  "Kira starts with 6 pens. Then Kira gets 3 times as many. How many pens does Kira have now?",
  "Leo has 10 eggs. Leo finds 5 eggs in a basket. Leo loses 3 eggs. How many eggs does Leo have now?",
];

// Nodes of a text with Markdown's fences, headings, bold letters and code; lists and the rest stay as they are written.
function marked(text) {
  const inline = (words) => words.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((one, at) => (at % 2 === 0 ? one : one[0] === "`" ? element("code", {}, one.slice(1, -1)) : element("strong", {}, one.slice(2, -2))));
  const prose = (words) => words.split(/^#{1,6} (.*)$/m).flatMap((one, at) => (at % 2 === 0 ? inline(one) : [element("strong.heading", {}, ...inline(one))]));
  return text.split(/^```.*\n([^]*?)(?:^```\s*|$(?![^]))/m).flatMap((one, at) => (at % 2 === 0 ? prose(one) : [element("pre", {}, one)]));
}

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
    this.length = element("input", { type: "number", min: 1, step: 1, placeholder: "no limit", style: "width: 84px", "aria-label": "Maximum tokens of an answer" });
    this.thinking = element("select", { "aria-label": "Thinking" }, ...["default", "on", "off"].map((word) => element("option", {}, word)));
    const settings = element("details", { ontoggle: () => { this.log.scrollTop = this.log.scrollHeight; } }, element("summary.soft", {}, "settings"), this.system,
      element("label.soft", {}, "temperature ", this.temperature), element("label.soft", {}, "tokens ", this.length), element("label.soft", {}, "thinking ", this.thinking));
    this.name = element("span.soft");
    const fresh = element("button.quiet", { type: "button", onclick: () => this.reset() }, "new");
    this.element = element("section.card.chat", { "aria-label": "Chat" }, element("header", {}, element("h2", {}, "Chat ", this.name), element("div.tools", {}, fresh)), this.log, settings, form);
  }

  // The model that is served, whose name and examples are shown.
  serve(name, model) {
    if (this.name.textContent === name) return;
    [this.name.textContent, this.isBuiltin] = [name, model === "builtin"];
    if (!this.messages.length) this.log.replaceChildren(...this.start());
  }

  // The empty conversation: what to do, and prompts to choose.
  start() {
    const prompts = (this.isBuiltin ? BUILTIN_EXAMPLES : EXAMPLES).map((text) => element("button.plain", { type: "button", onclick: () => { this.input.value = text; this.send(); } }, text));
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
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    if (this.temperature.value !== "") body.temperature = Number(this.temperature.value);
    if (this.length.value !== "") body.max_tokens = Number(this.length.value);
    if (this.thinking.value !== "default") body.chat_template_kwargs = { enable_thinking: this.thinking.value === "on" };
    const answer = this.say("assistant", "…");
    const [words, thoughts] = [answer.firstChild, element("div")];
    this.stop = new AbortController();
    this.button.textContent = "Stop";
    const began = performance.now();
    let [first, content, thought, usage, finish] = [null, "", "", null, null];
    try {
      const response = await this.ask("/v1/chat/completions", { method: "POST", signal: this.stop.signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      for await (const { data } of serverEvents(response.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const delta = chunk.choices[0]?.delta ?? {};
        finish = chunk.choices[0]?.finish_reason ?? finish;
        const [more, thinks] = [delta.content ?? "", delta.reasoning_content ?? ""];
        if (!more && !thinks) continue;
        first ??= performance.now() - began;
        if (thinks && !thought) words.before(element("details.thought", {}, element("summary.soft", {}, "reasoning"), thoughts));
        [content, thought] = [content + more, thought + thinks];
        thoughts.textContent = thought;
        words.data = content || "thinking …";
        this.log.scrollTop = this.log.scrollHeight;
      }
      if (content) words.replaceWith(...marked(content));
      else words.data = thought ? "(reasoning only)" : "(an empty answer)";
      if (usage) answer.append(this.told(usage, first, performance.now() - began, finish));
      this.log.scrollTop = this.log.scrollHeight;
    } catch (error) {
      if (error.name !== "AbortError") words.data = error.message;
    }
    if (content || thought) messages.push({ role: "assistant", content, ...(thought ? { reasoning_content: thought } : {}) });
    else messages.pop(); // Refused or not answered: the next message would be refused, too.
    this.stop = null;
    this.button.textContent = "Send";
  }

  told(usage, first, all, finish) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const rate = all - first >= 1000 * MIN_RATED_S ? `${((usage.completion_tokens - 1) / ((all - first) / 1000)).toFixed(0)} tok/s` : null;
    return element("small", {}, [`${whole.format(cached)} of ${whole.format(usage.prompt_tokens)} reused`, `TTFT ${seconds(first / 1000)}`, rate, finish === "length" ? "cut at the limit of tokens" : null].filter(Boolean).join(" · "));
  }
}
