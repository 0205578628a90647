
// The reader's decision and note on every case; they are kept in this page until they are saved as a file.
const REVIEW_FORMAT = "segmentation-review/1";

class Review extends EventTarget {
  constructor(reading, choices) {
    super();
    this.reading = reading;
    this.entries = choices.map(choice => ({case_id: choice.dataset.case, decision: null, note: "", mask: choice.dataset.mask || null, mask_sha256: choice.dataset.sha256 || null}));
    this.saved = true;
    this.form = reading.querySelector(".review");
    this.form.addEventListener("submit", event => event.preventDefault());
    this.form.addEventListener("input", () => this.read());
    this.form.querySelector(".clear").addEventListener("click", () => {
      for (const button of this.form.elements.decision) button.checked = false;
      this.read();
    });
    reading.querySelector(".save").addEventListener("click", () => this.save());
    reading.querySelector(".load input").addEventListener("change", event => this.load(event.target));
    addEventListener("beforeunload", event => { if (!this.saved) event.preventDefault(); });
    this.tell();
  }
  show(index) {
    this.index = index;
    const entry = this.entries[index];
    this.form.hidden = false;
    this.form.querySelector(".review-case").textContent = entry.case_id;
    for (const button of this.form.elements.decision) button.checked = button.value === entry.decision;
    this.form.elements.note.value = entry.note;
  }
  read() {
    const entry = this.entries[this.index];
    entry.decision = this.form.elements.decision.value || null;
    entry.note = this.form.elements.note.value;
    this.saved = false;
    this.tell();
  }
  tell(message = "") {
    const decided = this.entries.filter(entry => entry.decision).length;
    this.reading.querySelector(".progress").textContent = `${decided} of ${this.entries.length} decided.${this.saved ? "" : " Not saved."} ${message}`.trim();
    this.dispatchEvent(new Event("change"));
  }
  text() {
    const review = {format: REVIEW_FORMAT, report: this.reading.dataset.title, reader: this.form.elements.reader.value, saved: new Date().toISOString(), cases: this.entries};
    return JSON.stringify(review, null, 2) + "\n";
  }
  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.text()], {type: "application/json"}));
    link.download = this.reading.dataset.reviewFile;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    this.saved = true;
    this.tell();
  }
  async load(input) {
    const file = input.files[0];
    input.value = "";
    if (!file) return;
    let review = null;
    try { review = JSON.parse(await file.text()); } catch { /* told below */ }
    if (review?.format !== REVIEW_FORMAT || !Array.isArray(review.cases)) return this.tell(`${file.name} is no review of this format.`);
    if (!this.saved) return this.tell(`${file.name} is not loaded: save the decisions of this page first.`);
    const unknown = [], changed = [];
    for (const read of review.cases) {
      const entry = this.entries.find(each => each.case_id === read.case_id);
      if (!entry) { unknown.push(read.case_id); continue; }
      if (read.mask_sha256 && entry.mask_sha256 && read.mask_sha256 !== entry.mask_sha256) changed.push(read.case_id);
      entry.decision = ["accept", "correct", "reject"].includes(read.decision) ? read.decision : null;
      entry.note = String(read.note ?? "");
    }
    this.form.elements.reader.value = review.reader ?? "";
    this.saved = true;
    this.tell([unknown.length ? `Not in this page: ${unknown.join(", ")}.` : "", changed.length ? `The mask has changed since: ${changed.join(", ")}.` : ""].join(" ").trim());
    if (this.index !== undefined) this.show(this.index);
  }
}
