
// The viewer: one NiiVue per panel, all at one place, with the masks' outlines as lines on top.
const PLANE_AXES = [2, 1, 0];  // axial, coronal, sagittal: the axis that each cuts; NiiVue numbers planes in this order
const PLANE_LETTERS = ["RLPA", "RLIS", "PAIS"];  // at the left, right, bottom and top edge
const SCALE_BARS = [200, 100, 50, 20, 10, 5, 2, 1];

const bytesOf = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));
const unzipped = async text => new Uint8Array(await new Response(
  new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
const hasWebGL = () => {
  const gl = document.createElement("canvas").getContext("webgl2");
  gl?.getExtension("WEBGL_lose_context")?.loseContext();
  return Boolean(gl);
};

class Viewer {
  constructor(root) {
    this.root = root;
    this.views = root.querySelector(".views");
    this.slider = root.querySelector("#viewer-slice");
    this.panels = [];
    this.plane = 0;
    this.zoom = 1;
    this.slider.addEventListener("input", () => this.scene.moveAlong(this.axis(), Number(this.slider.value)));
    for (const button of root.querySelectorAll("[data-plane]")) button.addEventListener("click", () => this.setPlane(Number(button.dataset.plane)));
    for (const button of root.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => this.zoomBy(Number(button.dataset.zoom)));
    this.views.addEventListener("keydown", event => this.key(event), {capture: true});
    for (const kind of ["keyup", "keypress"]) this.views.addEventListener(kind, event => event.target.matches("canvas") && event.stopPropagation(), {capture: true});
  }
  axis() { return PLANE_AXES[this.plane % 3]; }  // of all planes together, the axial one

  async show(scene, volumes) {
    this.scene = scene;
    this.steps = volumes.steps;
    this.shape = scene.part.shape.map((size, axis) => Math.ceil(size / this.steps[axis]));
    this.masks = {};
    for (const [name, text] of Object.entries(volumes.masks)) this.masks[name] = await unzipped(text);
    this.root.hidden = false;
    this.views.dataset.count = scene.part.panels.length;
    while (this.panels.length < scene.part.panels.length) this.panels.push(await this.addPanel());
    for (const [index, panel] of this.panels.entries()) {
      panel.root.hidden = index >= scene.part.panels.length;
      if (!panel.root.hidden) await this.load(panel, scene.part.panels[index], volumes.images);
    }
    scene.addEventListener("move", () => this.scene === scene && this.update());
    scene.addEventListener("style", () => this.scene === scene && this.restyle());
    this.zoom = 1;
    this.setPlane(this.plane);
    this.restyle();
  }
  async addPanel() {
    const root = document.createElement("div"), head = document.createElement("div"), title = document.createElement("b");
    const select = document.createElement("select"), range = document.createElement("small");
    const frame = document.createElement("div"), image = document.createElement("canvas"), lines = document.createElement("canvas");
    root.className = "view";
    head.className = "view-head";
    frame.className = "view-frame";
    lines.className = "lines";
    image.tabIndex = -1;
    head.append(title, select, range);
    frame.append(image, lines);
    root.append(head, frame);
    this.views.append(root);
    const nv = new niivue.Niivue({
      isRadiologicalConvention: true, dragAndDropEnabled: false, loadingText: "", logLevel: "error", show3Dcrosshair: false,
      crosshairWidth: 0, isOrientationTextVisible: false, multiplanarShowRender: 0, isColorbar: false,
    });
    await nv.attachToCanvas(image);
    nv.addColormap("inverted", {R: [255, 0], G: [255, 0], B: [255, 0], A: [255, 255], I: [0, 255]});
    nv.addColormap("hot on CT", {R: [0, 255, 255, 255], G: [0, 0, 255, 255], B: [0, 0, 0, 255], A: [255, 255, 255, 255], I: [0, 85, 170, 255]});
    const panel = {root, title, select, range, image, lines, nv};
    const draw = nv.drawScene;
    nv.drawScene = () => { const result = draw.call(nv); this.drawLines(panel); return result; };
    nv.onLocationChange = place => {
      const [x, y, z] = place.mm;
      this.scene.move(this.scene.fromPatient([-x, -y, z]));
    };
    nv.onIntensityChange = volume => this.tellRange(panel, volume);
    select.addEventListener("change", () => {
      const preset = panel.data.presets[select.value];
      if (preset) this.setWindow(panel, preset.low, preset.high);
    });
    return panel;
  }
  async load(panel, data, images) {
    const {nv} = panel;
    panel.data = data;
    panel.title.textContent = data.name;
    panel.image.setAttribute("aria-label", `${this.scene.part.case}: ${data.name}`);
    panel.select.setAttribute("aria-label", `Window of ${data.name}`);
    panel.select.replaceChildren(...data.presets.map((preset, index) => new Option(preset.name, index)));
    nv.opts.backColor = data.light ? [1, 1, 1, 1] : [0, 0, 0, 1];
    for (const volume of [...nv.volumes].reverse()) nv.removeVolume(volume);
    for (const name of data.over ? [data.image, data.over] : [data.image]) await nv.loadFromArrayBuffer(bytesOf(images[name]).buffer, `${name}.nii.gz`);
    nv.volumes[0].colormap = data.light ? "inverted" : "gray";
    if (data.over) {
      nv.volumes[1].colormap = "hot on CT";
      nv.setModulationImage(nv.volumes[1].id, nv.volumes[1].id, 1);  // the higher PET, the less transparent
      [nv.volumes[0].cal_min, nv.volumes[0].cal_max] = [data.window.low, data.window.high];
    }
    this.setWindow(panel, data.presets[0].low, data.presets[0].high);
  }
  setWindow(panel, low, high) {
    const volume = panel.nv.volumes.at(-1);
    [volume.cal_min, volume.cal_max] = [low, high];
    panel.nv.updateGLVolume();
    this.tellRange(panel, volume);
  }
  tellRange(panel, volume) {
    if (volume !== panel.nv.volumes.at(-1)) return;
    panel.range.textContent = `${Number(volume.cal_min.toPrecision(4))} to ${Number(volume.cal_max.toPrecision(4))}`;
  }

  shown() { return this.panels.filter(panel => !panel.root.hidden); }
  setPlane(plane) {
    this.plane = plane;
    for (const button of this.root.querySelectorAll("[data-plane]")) button.setAttribute("aria-pressed", Number(button.dataset.plane) === plane);
    const axis = this.axis();
    this.slider.max = this.scene.part.shape[axis] - 1;
    this.slider.setAttribute("aria-label", `${["Axial", "Coronal", "Sagittal", "Axial"][plane]} slice`);
    for (const {nv} of this.shown()) nv.setSliceType([nv.sliceTypeAxial, nv.sliceTypeCoronal, nv.sliceTypeSagittal, nv.sliceTypeMultiplanar][plane]);
    this.update();
  }
  zoomBy(factor) {
    this.zoom = factor ? Math.min(Math.max(this.zoom * factor, 1), 16) : 1;
    for (const {nv} of this.shown()) {
      const middle = nv.frac2mm([0.5, 0.5, 0.5]), cross = nv.frac2mm(nv.scene.crosshairPos);
      const pan = this.zoom > 1 ? [0, 1, 2].map(axis => middle[axis] - cross[axis] * this.zoom) : [0, 0, 0];
      nv.setPan2Dxyzmm([...pan, this.zoom]);
    }
  }
  update() {
    const [x, y, z] = this.scene.patient(), axis = this.axis();
    this.slider.value = Math.round(this.scene.position[axis]);
    const text = `slice ${Math.round(this.scene.position[axis]) + 1} of ${this.scene.part.shape[axis]}`;
    this.slider.setAttribute("aria-valuetext", text);
    this.root.querySelector("output").textContent = text;
    for (const {nv} of this.shown()) {
      nv.scene.crosshairPos = nv.mm2frac([-x, -y, z], 0, true);
      nv.drawScene();
    }
  }
  restyle() { for (const panel of this.shown()) this.drawLines(panel); }
  key(event) {
    if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const axis = this.axis(), at = Math.round(this.scene.position[axis]), last = this.scene.part.shape[axis] - 1;
    const slices = {ArrowUp: at + 1, ArrowRight: at + 1, ArrowDown: at - 1, ArrowLeft: at - 1, PageUp: at + 5, PageDown: at - 5, Home: 0, End: last};
    const press = selector => document.querySelector(selector)?.click();
    const actions = {
      1: () => this.setPlane(0), 2: () => this.setPlane(1), 3: () => this.setPlane(2), 4: () => this.setPlane(3),
      "+": () => this.zoomBy(1.25), "-": () => this.zoomBy(0.8), 0: () => this.zoomBy(0), d: () => press(".to-difference"),
      o: () => document.querySelectorAll(".key [data-mask]").forEach(box => box.click()), c: () => press(".show-cross"),
    };
    if (event.key in slices) this.scene.moveAlong(axis, slices[event.key]);
    else if (event.key in actions) actions[event.key]();
    else { if (event.key !== "Tab") event.stopPropagation(); return; }  // NiiVue has keys of its own
    event.preventDefault();
    event.stopPropagation();
  }

  drawLines(panel) {
    const {nv, lines, image} = panel;
    if (!this.scene || !nv.volumes.length || panel.root.hidden) return;
    [lines.width, lines.height] = [image.width, image.height];
    const context = lines.getContext("2d"), dpr = image.width / Math.max(image.clientWidth, 1);
    for (const tile of nv.screenSlices) {
      if (tile.axCorSag > 2) continue;
      context.save();
      context.beginPath();
      context.rect(...tile.leftTopWidthHeight);
      context.clip();
      this.drawOutlines(nv, context, tile, dpr);
      this.drawCross(nv, context, tile, dpr);
      this.drawScale(context, tile, dpr, panel.data.light);
      this.drawLetters(context, tile, dpr, panel.data.light);
      context.restore();
    }
  }
  drawOutlines(nv, context, tile, dpr) {
    const axis = PLANE_AXES[tile.axCorSag], [across, up] = [0, 1, 2].filter(other => other !== axis);
    const slice = Math.min(Math.round(this.scene.position[axis] / this.steps[axis]), this.shape[axis] - 1);
    const canvas = (u, v) => {
      const index = [];
      [index[axis], index[across], index[up]] = [this.scene.position[axis], u * this.steps[across], v * this.steps[up]];
      const saved = this.scene.position;
      this.scene.position = index;
      const [x, y, z] = this.scene.patient();
      this.scene.position = saved;
      return this.place(nv, tile, nv.mm2frac([-x, -y, z], 0, true));
    };
    const origin = canvas(0, 0), right = canvas(1, 0), top = canvas(0, 1);
    const point = (u, v) => [origin[0] + u * (right[0] - origin[0]) + v * (top[0] - origin[0]), origin[1] + u * (right[1] - origin[1]) + v * (top[1] - origin[1])];
    context.lineWidth = 2 * dpr;
    for (const outline of this.scene.part.outlines) {
      if (this.scene.isHidden(outline.mask, outline.region)) continue;
      const inside = this.insideOf(outline, axis, across, up, slice);
      context.beginPath();
      for (const [first, ...others] of joined(contour(inside, this.shape[across], this.shape[up]))) {
        context.moveTo(...point(...first));
        for (const next of others) context.lineTo(...point(...next));
      }
      context.globalAlpha = this.scene.opacity;
      context.strokeStyle = outline.colour;
      context.lineCap = outline.dashed ? "butt" : "round";
      context.setLineDash(outline.dashed ? [6 * dpr, 4 * dpr] : []);
      context.stroke();
    }
    context.globalAlpha = 1;
  }
  drawCross(nv, context, tile, dpr) {
    if (!this.scene.cross) return;
    const [x, y] = this.place(nv, tile, nv.scene.crosshairPos), [left, top, width, height] = tile.leftTopWidthHeight, gap = 8 * dpr;
    context.strokeStyle = "#33bf59";
    context.lineWidth = dpr;
    context.setLineDash([]);
    context.beginPath();
    for (const [from, to] of [[left, x - gap], [x + gap, left + width]]) { context.moveTo(from, y); context.lineTo(to, y); }
    for (const [from, to] of [[top, y - gap], [y + gap, top + height]]) { context.moveTo(x, from); context.lineTo(x, to); }
    context.stroke();
  }
  drawLetters(context, tile, dpr, light) {
    const [left, top, width, height] = tile.leftTopWidthHeight, edge = 10 * dpr;
    const places = [[left + edge, top + height / 2], [left + width - edge, top + height / 2], [left + width / 2, top + height - edge], [left + width / 2, top + edge]];
    context.font = `600 ${13 * dpr}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3 * dpr;
    context.strokeStyle = light ? "#ffffff" : "#000000";
    context.fillStyle = light ? "#000000" : "#ffffff";
    places.forEach((place, index) => {
      context.strokeText(PLANE_LETTERS[tile.axCorSag][index], ...place);
      context.fillText(PLANE_LETTERS[tile.axCorSag][index], ...place);
    });
  }
  insideOf(outline, axis, across, up, slice) {
    const strides = [1, this.shape[0], this.shape[0] * this.shape[1]], mask = this.masks[outline.mask], codes = outline.codes;
    return (u, v) => u >= 0 && v >= 0 && u < this.shape[across] && v < this.shape[up]
      && codes.includes(mask[slice * strides[axis] + u * strides[across] + v * strides[up]]);
  }
  // NiiVue's own way from a voxel to the canvas; a tile shows leftTopMM to leftTopMM + fovMM.
  place(nv, tile, frac) { return nv.frac2canvasPosWithTile([...frac], tile.axCorSag)?.pos ?? [0, 0]; }
  drawScale(context, tile, dpr, light) {
    const [left, top, width, height] = tile.leftTopWidthHeight, perMm = width / Math.abs(tile.fovMM[0]);
    const length = SCALE_BARS.find(mm => mm * perMm <= width / 3);
    if (!length) return;
    const x = left + width - 8 * dpr - length * perMm, y = top + height - 10 * dpr;
    context.strokeStyle = context.fillStyle = light ? "#000000" : "#ffffff";
    context.lineWidth = 2 * dpr;
    context.setLineDash([]);
    context.strokeRect(x, y, length * perMm, 0);
    context.font = `${12 * dpr}px system-ui, sans-serif`;
    context.textAlign = "right";
    context.fillText(`${length} mm`, left + width - 8 * dpr, y - 5 * dpr);
  }
}

// The border of a mask in a slice as short lines between the middles of voxel edges (marching squares).
function* contour(inside, width, height) {
  for (let v = -1; v < height; v++) {
    for (let u = -1; u < width; u++) {
      const [a, b, c, d] = [inside(u, v), inside(u + 1, v), inside(u + 1, v + 1), inside(u, v + 1)];
      const crossings = [];
      if (a !== b) crossings.push([u + 0.5, v]);
      if (b !== c) crossings.push([u + 1, v + 0.5]);
      if (c !== d) crossings.push([u + 0.5, v + 1]);
      if (d !== a) crossings.push([u, v + 0.5]);
      if (crossings.length === 2) yield crossings;
      if (crossings.length === 4) {  // two corners that touch: cut off each inside corner
        const [bottom, right, top, left] = crossings;
        yield a ? [bottom, left] : [bottom, right];
        yield a ? [right, top] : [top, left];
      }
    }
  }
}

// Short lines with common ends as long ones, on which dashes do not begin anew at every voxel.
function joined(segments) {
  const key = ([u, v]) => `${u},${v}`, left = new Set(segments), ends = new Map(), lines = [];
  for (const segment of left) for (const end of segment) ends.set(key(end), [...ends.get(key(end)) ?? [], segment]);
  for (const first of left) {
    left.delete(first);
    const line = [...first];
    for (let next; next = ends.get(key(line.at(-1))).find(segment => left.has(segment));) {
      left.delete(next);
      line.push(key(next[0]) === key(line.at(-1)) ? next[1] : next[0]);
    }
    lines.push(line);
  }
  return lines;
}
