
// Where the cross-hair is, and what of a case is shown. Positions are indices of the grid on which the case is drawn, whose
// axes run to the left, to anterior and to superior.
class Scene extends EventTarget {
  constructor(part) {
    super();
    this.part = part;
    this.position = [...part.start];
    this.hidden = new Set();  // "mask:<name>" and "region:<number>"
    this.opacity = 1;
    this.cross = true;
  }
  move(position) {
    this.position = position.map((index, axis) => Math.min(Math.max(index, 0), this.part.shape[axis] - 1));
    this.dispatchEvent(new Event("move"));
  }
  moveAlong(axis, index) { this.move(this.position.map((old, other) => other === axis ? index : old)); }
  restyle() { this.dispatchEvent(new Event("style")); }
  isHidden(mask, region) { return this.hidden.has(`mask:${mask}`) || this.hidden.has(`region:${region}`); }
  patient() { return this.part.affine.slice(0, 3).map(row => row[3] + row[0] * this.position[0] + row[1] * this.position[1] + row[2] * this.position[2]); }
  fromPatient(mm) {
    const rows = this.part.affine, centred = mm.map((value, row) => value - rows[row][3]);
    return [0, 1, 2].map(axis => {
      const column = [0, 1, 2].map(row => rows[row][axis]), square = column.reduce((sum, value) => sum + value * value, 0);
      return column.reduce((sum, value, row) => sum + value * centred[row], 0) / square;
    });
  }
  text() {
    const mm = this.patient(), number = value => Math.abs(value).toFixed(1), signed = value => value.toFixed(1).replace("-", "\u2212");
    const letters = ["RL", "AP", "IS"].map((pair, axis) => `${pair[mm[axis] < 0 ? 0 : 1]} ${number(mm[axis])}`);
    const slices = [["axial z", 2, 2, 1], ["coronal y", 1, 1, -1], ["sagittal x", 0, 0, 1]].map(([name, axis, row, sign]) => {
      const column = [0, 1, 2].map(at => this.part.affine[at][axis]), length = Math.hypot(...column);
      const along = sign * column.reduce((sum, value, at) => sum + value * mm[at], 0) / length;
      return `${name} ${signed(along)} mm (${Math.round(this.position[axis]) + 1} of ${this.part.shape[axis]})`;
    });
    return `Cross-hair ${letters.join(", ")} mm. DICOM slice position: ${slices.join(", ")}.`;
  }
}

// The still images of a case: a slider shifts the strip of frames of its plane, a click moves the cross-hair.
class Stills {
  constructor(root, scene) {
    this.root = root;
    this.scene = scene;
    this.planes = [...root.querySelectorAll(".plane")];
    for (const plane of this.planes) this.prepare(plane);
    scene.addEventListener("move", () => this.show());
    scene.addEventListener("style", () => this.restyle());
    this.show();
    this.restyle();
  }
  prepare(plane) {
    const axis = Number(plane.dataset.axis), slider = plane.querySelector("input");
    const [across, up] = [0, 1, 2].filter(other => other !== axis), [width, height] = plane.dataset.drawn.split(" ").map(Number);
    plane.indices = plane.dataset.indices.split(" ").map(Number);
    slider.addEventListener("input", () => this.scene.moveAlong(axis, plane.indices[slider.value]));
    const frames = [...plane.querySelectorAll(".frame")];
    for (const frame of frames.slice(1)) {
      for (const outline of frames[0].querySelectorAll(".outline")) frame.querySelector("img").after(outline.cloneNode());
    }
    plane.place = () => {
      const share = index => (this.scene.position[index] + 0.5) / this.scene.part.shape[index];
      plane.style.setProperty("--x", (1 - width) / 2 + share(across) * width);
      plane.style.setProperty("--y", (1 + height) / 2 - share(up) * height);
    };
    for (const frame of frames) frame.addEventListener("click", event => {
      const box = frame.getBoundingClientRect(), shape = this.scene.part.shape;
      const x = ((event.clientX - box.left) / box.width - (1 - width) / 2) / width;
      const y = ((1 + height) / 2 - (event.clientY - box.top) / box.height) / height;
      const position = [...this.scene.position];
      [position[across], position[up]] = [Math.round(x * shape[across] - 0.5), Math.round(y * shape[up] - 0.5)];
      this.scene.move(position);
    });
  }
  show() {
    for (const plane of this.planes) {
      const at = this.scene.position[plane.dataset.axis], slider = plane.querySelector("input");
      const distances = plane.indices.map(index => Math.abs(index - at)), frame = distances.indexOf(Math.min(...distances));
      const text = `slice ${plane.indices[frame] + 1} of ${plane.dataset.sliceCount}`;
      slider.value = frame;
      plane.style.setProperty("--current", frame);
      plane.querySelector("output").textContent = text;
      slider.setAttribute("aria-valuetext", text);
      plane.place();
    }
  }
  restyle() {
    this.root.classList.toggle("no-cross", !this.scene.cross);
    for (const outline of this.root.querySelectorAll(".outline")) {
      outline.hidden = this.scene.isHidden(outline.dataset.mask, outline.dataset.region);
      outline.style.opacity = this.scene.opacity;
    }
  }
}
