
// The list of cases: what belongs to a case is loaded when it is opened.
const reportParts = {};
globalThis.addReportPart = (name, value) => { reportParts[name] = value; };

function loadScript(source, text) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    if (text !== undefined) script.textContent = text;
    else {
      script.src = source;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${source} cannot be loaded. Keep the folder beside this page.`));
    }
    document.head.append(script);
    if (text !== undefined) resolve();
  });
}

async function loadPart(name, source) {
  if (reportParts[name]) return reportParts[name];
  const embedded = document.getElementById(`part-${name}`);
  if (embedded) return JSON.parse(embedded.textContent);
  await loadScript(source);
  const part = reportParts[name];
  delete reportParts[name];  // the volumes of 50 cases would fill the memory
  return part;
}

class Cases {
  constructor(reading) {
    this.reading = reading;
    this.choices = [...reading.querySelectorAll(".choice")];
    this.review = new Review(reading, this.choices);
    this.head = reading.querySelector(".case-head");
    this.rest = reading.querySelector(".case-rest");
    this.status = reading.querySelector(".loading");
    this.choices.forEach((choice, index) => choice.addEventListener("click", () => this.open(index, true)));
    this.review.addEventListener("change", () => this.mark());
    const step = by => () => this.open((this.index + by + this.choices.length) % this.choices.length, true);
    reading.querySelector(".previous").addEventListener("click", step(-1));
    reading.querySelector(".next").addEventListener("click", step(1));
    reading.querySelector(".steps").hidden = this.choices.length < 2;
    for (const link of document.querySelectorAll(".plot a[data-case]")) {
      const index = this.choices.findIndex(choice => choice.dataset.case === link.dataset.case);
      if (index < 0) link.removeAttribute("href");
      link.addEventListener("click", event => { event.preventDefault(); if (index >= 0) this.open(index, true); });
    }
    this.open(0, false);
  }
  mark() {
    this.choices.forEach((choice, index) => {
      const {decision, note} = this.review.entries[index];
      choice.querySelector(".decision").textContent = [decision, note && "note"].filter(Boolean).join(", ");
      choice.dataset.decision = decision ?? "";
    });
  }
  async open(index, byReader) {
    const choice = this.choices[index];
    this.index = index;
    this.choices.forEach(each => each === choice ? each.setAttribute("aria-current", "true") : each.removeAttribute("aria-current"));
    choice.parentElement.parentElement.scrollTop = choice.parentElement.offsetTop - choice.parentElement.parentElement.offsetTop - 60;
    this.status.textContent = `Loading ${choice.dataset.case} \u2026`;
    try {
      const part = await loadPart(choice.id, choice.dataset.file);
      if (this.index !== index) return;
      const template = document.createElement("template");
      template.innerHTML = part.html;  // made by the report's templates, which escape all text from files
      this.head.replaceChildren(template.content.querySelector(".head"));
      this.rest.replaceChildren(template.content.querySelector(".rest"));
      const scene = new Scene(part);
      this.connect(scene);
      new Stills(this.rest.querySelector(".stills"), scene);
      this.review.show(index);
      if (byReader) {
        this.reading.querySelector(".case").focus({preventScroll: true});
        this.reading.querySelector(".case").scrollIntoView({block: "start"});
      }
      await this.openViewer(scene, choice, index);
      this.status.textContent = "";
    } catch (error) {
      if (this.index === index) this.status.textContent = error.message;
    }
    this.reading.dataset.opened = choice.id;
  }
  connect(scene) {
    const body = this.head, output = body.querySelector(".position output");
    const tell = () => { output.textContent = scene.text(); };
    scene.addEventListener("move", tell);
    tell();
    body.querySelector(".show-cross").addEventListener("change", event => { scene.cross = event.target.checked; scene.restyle(); });
    body.querySelector(".opacity").addEventListener("input", event => { scene.opacity = event.target.value / 100; scene.restyle(); });
    body.querySelector(".to-difference")?.addEventListener("click", () => scene.move(scene.part.difference));
    for (const box of body.querySelectorAll(".key [data-mask], .key [data-region]")) box.addEventListener("change", () => {
      const key = box.dataset.mask ? `mask:${box.dataset.mask}` : `region:${box.dataset.region}`;
      box.checked ? scene.hidden.delete(key) : scene.hidden.add(key);
      scene.restyle();
    });
  }
  async openViewer(scene, choice, index) {
    if (!("hasViewer" in this.reading.dataset) || this.withoutViewer) return;
    const stills = this.rest.querySelector(".stills"), root = this.reading.querySelector(".viewer");
    try {
      if (!hasWebGL()) throw new Error("This browser has no WebGL");
      if (!globalThis.niivue) await loadScript(this.reading.dataset.viewer, document.getElementById("part-viewer")?.textContent);
      this.viewer ??= new Viewer(root);
      const volumes = await loadPart(`${choice.id}-volumes`, choice.dataset.volumes);
      // One after the other: two that load at the same time would mix their images.
      this.shown = (this.shown ?? Promise.resolve()).catch(() => {}).then(() => this.index === index && this.viewer.show(scene, volumes));
      await this.shown;
      if (this.index === index) stills.hidden = true;
    } catch (error) {
      this.withoutViewer = true;
      root.hidden = true;
      stills.hidden = false;
      const note = this.reading.querySelector(".no-viewer");
      note.textContent = `${error.message.replace(/\.$/, "")}: still images are shown.`;
      note.hidden = false;
    }
  }
}

const reading = document.querySelector(".reading");
if (reading) new Cases(reading);
