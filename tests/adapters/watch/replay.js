// Shows embedded records instead of those of a server, for tests of the page.
class Replay {
  constructor(main, { meta, records }) {
    Object.assign(this, { meta, records });
    this.view = new View(new Model(meta));
    main.className = "single live";
    main.append(this.view.element, element("div.aside", {}, this.view.details.element));
    this.go(Infinity);
  }

  // Shows the records up to a moment, a number of requests.
  go(moment) {
    const model = new Model(this.meta);
    for (const record of this.records) {
      if (record[0] === "time" && record[2] > moment) break;
      model.apply(record);
    }
    this.view.show(model);
  }
}
