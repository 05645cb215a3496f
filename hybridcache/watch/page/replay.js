// A recording: the same picture at any moment, one run or two beside each other.
const KEYFRAMES = 24;

// One run that can be set to any moment, which is a number of requests; forward is cheap, back begins at the keyframe before.
class Run {
  constructor({ meta, records }) {
    Object.assign(this, { meta, records });
    this.times = [];
    let now = 0;
    for (const record of records) { if (record[0] === "time") [, , now] = record; this.times.push(now); }
    this.end = now;
    this.every = Math.max(500, Math.ceil(records.length / KEYFRAMES));
    this.frames = new Map([[0, new Model(meta)]]);
    this.model = this.frames.get(0).clone();
    this.at = 0;
  }

  // How many records there are up to a moment. O(log records).
  until(moment) {
    let [low, high] = [0, this.times.length];
    while (low < high) { const middle = (low + high) >> 1; if (this.times[middle] <= moment) low = middle + 1; else high = middle; }
    return low;
  }

  go(moment) {
    const to = this.until(moment);
    const nearest = Math.max(...[...this.frames.keys()].filter((at) => at <= to));
    if (to < this.at || nearest > this.at) { this.model = this.frames.get(nearest).clone(); this.at = nearest; }
    for (; this.at < to; this.at += 1) {
      if (this.at && this.at % this.every === 0 && !this.frames.has(this.at)) this.frames.set(this.at, this.model.clone());
      this.model.apply(this.records[this.at]);
    }
    return this.model;
  }
}

class Replay {
  constructor(main, { runs }) {
    this.runs = runs.map((run) => new Run(run));
    this.end = Math.max(...this.runs.map((run) => run.end));
    this.moments = [...new Set(this.runs.flatMap((run) => run.times))].sort((a, b) => a - b);
    this.shown = this.runs.length > 1 ? [0, 1] : [0];
    this.moment = this.end;
    main.className = this.runs.length > 1 ? "pair" : "single live";
    const { trace } = this.runs[0].meta;
    document.getElementById("title").textContent = trace ?? "";
    document.title = `${trace ?? "a run"} · hybridcache`;
    const link = document.getElementById("link");
    link.dataset.state = "replay";
    link.textContent = "a recorded run";
    this.views = this.shown.map((number, side) => this.view(number, side));
    this.details = new Details(this.views[0]);
    for (const view of this.views) { view.details = this.details; view.onselect = (one) => this.chose(one); view.oncolour = (by) => this.views.forEach((other) => other.colourBy(by)); }
    main.append(this.player(), ...this.views.map((view) => view.element), element("div.aside", {}, this.details.element));
    this.go(this.end);
  }

  view(number, side) {
    const title = this.runs.length > 2 ? element("select.pick", { "aria-label": "Run", onchange: (event) => { this.shown[side] = Number(event.target.value); this.go(this.moment); } }, ...this.runs.map((run, at) => element("option", { value: at, selected: at === number }, run.meta.title))) : element("h2", {}, this.runs[number].meta.title);
    return new View(this.runs[number].model, { title, details: false });
  }

  chose(view) {
    this.details.view = view;
    for (const other of this.views) if (other !== view) { other.tree.selected = null; other.selectedRequest = null; other.update(); }
    if (view.selectedRequest) {
      this.details.request(view.model.requests.get(view.selectedRequest));
      for (const other of this.views) if (other !== view && other.model.requests.has(view.selectedRequest)) { other.selectedRequest = view.selectedRequest; other.update(); }
    } else if (view.tree.selected) this.details.node(view.tree.selected);
    else this.details.hint();
  }

  player() {
    this.slider = element("input", { type: "range", min: 0, max: this.moments.length - 1, value: this.moments.length - 1, "aria-label": "Time", oninput: () => { this.pause(); this.go(this.moments[this.slider.value]); } });
    this.output = element("output");
    this.button = element("button.main", { type: "button", onclick: () => (this.playing ? this.pause() : this.play()) }, "Play");
    const speeds = [5, 20, 80].map((one) => element("option", { value: one, selected: one === 20 }, `${one} steps/s`));
    this.speed = element("select.pick", { "aria-label": "Speed" }, ...speeds);
    const step = (by, label, text) => element("button.quiet", { type: "button", "aria-label": label, onclick: () => { this.pause(); this.step(by); } }, text);
    return element("section.card.player", { "aria-label": "Time" }, this.button, step(-1, "One step back", "‹"), step(1, "One step on", "›"), this.slider, this.output, this.speed);
  }

  step(by) {
    const at = Math.max(0, Math.min(this.moments.length - 1, Number(this.slider.value) + by));
    this.slider.value = at;
    this.go(this.moments[at]);
    return at < this.moments.length - 1;
  }

  play() {
    if (Number(this.slider.value) >= this.moments.length - 1) this.slider.value = 0;
    this.button.textContent = "Pause";
    let before = performance.now();
    let owed = 0;
    const turn = (now) => {
      owed += (now - before) / 1000 * Number(this.speed.value);
      before = now;
      const steps = Math.floor(owed);
      owed -= steps;
      if (steps && !this.step(steps)) { this.pause(); return; }
      this.playing = requestAnimationFrame(turn);
    };
    this.playing = requestAnimationFrame(turn);
  }

  pause() {
    cancelAnimationFrame(this.playing);
    this.playing = null;
    this.button.textContent = "Play";
  }

  go(moment) {
    this.moment = moment;
    for (const [side, view] of this.views.entries()) {
      const run = this.runs[this.shown[side]];
      const model = run.go(moment);
      if (view.model !== model) view.show(model); else view.update();
    }
    const model = this.views[0].model;
    this.output.textContent = `request ${whole.format(model.time)} · ${seconds(model.clock)}`;
    this.slider.setAttribute("aria-valuetext", this.output.textContent);
  }
}
