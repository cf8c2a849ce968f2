// The parts of the page that are not Gradio's: dropping photographs, painting masks, drawing regions.
// Photographs stay here, in the browser, and go to the service with each request that uses them.
"use strict";

window.magicface = (() => {
  const SIDE = 1024; // pixels of a mask's longer side at most; the method samples masks on a grid of 128
  const LEAST_SIDE = 256; // of its shorter side, where the photograph has as many
  const UNDO = 8;
  const TINT = "rgba(230, 159, 0, 0.55)";
  const MOST_NAME = 180; // bytes of a photograph's name that is kept; with a number it may have 200, in file_names.py
  const NO_NAME = /^$|^[-.]|^\s|\s$|[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}/\\]/u;
  const NOT_SAVED = /["*:<>?|~]+/g; // browsers replace these in the name of a file that they save

  const editors = new Map(); // by concept; a concept that was removed from the page and comes back is empty
  let wanted = 0; // the concept that was just added
  let turns = 0; // counts files that were chosen: of several that are read at the same time the last one counts

  const emptyEditor = (slot) => ({
    slot,
    name: "",
    image: "", // base64 of the photograph's bytes
    picture: null, // what is drawn: an HTMLImageElement
    mask: null, // a canvas: white where the concept is, else transparent
    loaded: null, // base64 of a mask's file as long as nothing was painted over it
    before: [], // for undo
    erasing: false,
    cursor: null, // [x, y] of the keyboard's brush
    turn: 0, // of the photograph
    maskTurn: 0,
    note: "",
    root: null,
  });

  const editor = (slot) => {
    if (!editors.has(slot)) editors.set(slot, emptyEditor(slot));
    return editors.get(slot);
  };

  // ------------------------------------------------------------------------------------------------- files

  const base64Of = (file) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(String(reader.result).split(",", 2)[1] || "");
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });

  const typeOf = (base64) => {
    if (base64.startsWith("iVBORw")) return "image/png";
    if (base64.startsWith("/9j/")) return "image/jpeg";
    return "image/webp";
  };

  const pictureOf = (base64) =>
    new Promise((resolve) => {
      const picture = new Image();
      picture.onload = () => resolve(picture);
      picture.onerror = () => resolve(null);
      picture.src = `data:${typeOf(base64)};base64,${base64}`;
    });

  const setPhotograph = async (e, base64, name, mask) => {
    const root = e.root;
    const turn = ++turns;
    Object.assign(e, emptyEditor(e.slot), { root, image: base64, name, turn });
    const picture = base64 ? await pictureOf(base64) : null;
    if (e.turn !== turn) return;
    const most = Number(root?.dataset.pixels || 16e6);
    if (!picture) {
      e.note = "This browser cannot show the file. It is sent as it is.";
    } else if (picture.naturalWidth * picture.naturalHeight > most) {
      e.note = `${picture.naturalWidth} x ${picture.naturalHeight} pixels: too large to be shown. It is sent as it is.`;
    } else {
      e.picture = picture;
      e.mask = document.createElement("canvas");
      [e.mask.width, e.mask.height] = sizeOfMask(picture.naturalWidth, picture.naturalHeight);
      e.note = "Paint over what belongs to the concept, or load a mask.";
      if (takeAlpha(e)) e.note = "The transparent part of the picture is left out of the mask.";
      if (mask) await setMask(e, mask);
    }
    show(e);
  };

  const sizeOfMask = (width, height) => {
    const scale = Math.min(1, Math.max(SIDE / Math.max(width, height), LEAST_SIDE / Math.min(width, height)));
    return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  };

  const takeAlpha = (e) => {
    const { width, height } = e.mask;
    const context = e.mask.getContext("2d", { willReadFrequently: true });
    context.drawImage(e.picture, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    let transparent = false;
    for (let i = 3; i < pixels.data.length; i += 4) {
      const inside = pixels.data[i] >= 128;
      transparent ||= !inside;
      pixels.data.fill(255, i - 3, i);
      pixels.data[i] = inside ? 255 : 0;
    }
    if (transparent) context.putImageData(pixels, 0, 0);
    else context.clearRect(0, 0, width, height);
    return transparent;
  };

  // White is the concept; where the file has transparency, that counts instead, as in the SDK.
  const setMask = async (e, base64) => {
    if (!e.mask) return;
    remember(e);
    e.loaded = base64;
    const turn = (e.maskTurn = ++turns);
    const picture = await pictureOf(base64);
    if (e.maskTurn !== turn) return;
    const { width, height } = e.mask;
    const context = e.mask.getContext("2d", { willReadFrequently: true });
    context.clearRect(0, 0, width, height);
    if (!picture) {
      e.note = "This browser cannot show the mask. It is sent as it is.";
      return show(e);
    }
    context.drawImage(picture, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    let opaque = true;
    for (let i = 3; i < pixels.data.length && opaque; i += 4) opaque = pixels.data[i] >= 128;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const [r, g, b, a] = pixels.data.subarray(i, i + 4);
      const value = opaque ? 0.299 * r + 0.587 * g + 0.114 * b : a;
      pixels.data.fill(255, i, i + 3);
      pixels.data[i + 3] = value >= 128 ? 255 : 0;
    }
    context.putImageData(pixels, 0, 0);
    const [w, h] = [picture.naturalWidth, picture.naturalHeight];
    e.note = `Mask loaded, ${w} x ${h}; the photograph is ${e.picture.naturalWidth} x ${e.picture.naturalHeight}.`;
    show(e);
  };

  const exported = (e) => {
    const sheet = document.createElement("canvas");
    [sheet.width, sheet.height] = [e.mask.width, e.mask.height];
    const context = sheet.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.drawImage(e.mask, 0, 0);
    return sheet.toDataURL("image/png").split(",", 2)[1];
  };

  const maskOf = (e) => (e.loaded !== null ? e.loaded : e.mask ? exported(e) : null);

  // ---------------------------------------------------------------------------------------------- painting

  const remember = (e) => {
    const { width, height } = e.mask;
    const pixels = e.mask.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
    e.before.push([pixels, e.loaded]);
    if (e.before.length > UNDO) e.before.shift();
  };

  const undo = (e) => {
    const last = e.before.pop();
    if (!last) return;
    e.mask.getContext("2d").putImageData(last[0], 0, 0);
    e.loaded = last[1];
    show(e);
  };

  const brush = (e) => (Number(e.root.querySelector(".mf-size").value) / 200) * Math.min(e.mask.width, e.mask.height);

  const stroke = (e, from, to) => {
    const context = e.mask.getContext("2d");
    context.globalCompositeOperation = e.erasing ? "destination-out" : "source-over";
    context.strokeStyle = "white";
    context.lineCap = "round";
    context.lineWidth = Math.max(1, 2 * brush(e));
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    e.loaded = null;
    e.note = "";
    show(e);
  };

  const fill = (e, white) => {
    remember(e);
    const context = e.mask.getContext("2d");
    context.clearRect(0, 0, e.mask.width, e.mask.height);
    context.fillStyle = "white";
    if (white) context.fillRect(0, 0, e.mask.width, e.mask.height);
    e.loaded = null;
    e.note = "";
    show(e);
  };

  const show = (e) => {
    if (!e.root) return;
    const part = (name) => e.root.querySelector(name);
    part(".mf-paint").hidden = !e.mask;
    part(".mf-note").textContent = e.note;
    part(".mf-erase").setAttribute("aria-pressed", String(e.erasing));
    part(".mf-hint").textContent = e.image
      ? `${e.name || "A photograph"} is loaded; drop or choose another to replace it.`
      : "or drop a PNG, JPEG or WebP file here.";
    if (!e.mask) return;
    const canvas = part(".mf-canvas");
    const { width, height } = e.mask;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, width, height);
    context.drawImage(e.mask, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = TINT;
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.drawImage(e.picture, 0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    if (e.cursor && document.activeElement === canvas) {
      for (const [colour, more] of [["black", 0], ["white", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = 2;
        context.beginPath();
        context.arc(...e.cursor, brush(e) + more, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  };

  // ---------------------------------------------------------------------------------------------- listening

  const mount = (element) => {
    const root = element.querySelector(".mf-editor");
    const e = editor(Number(root.dataset.slot));
    e.root = root;
    const part = (name) => root.querySelector(name);
    const canvas = part(".mf-canvas");

    const take = async (file) => {
      if (!file) return;
      const turn = (e.turn = ++turns);
      const base64 = await base64Of(file);
      if (e.turn === turn) await setPhotograph(e, base64, file.name, null);
    };
    const chosen = (event) => {
      const file = event.target.files[0];
      event.target.value = ""; // so that the same file may be chosen again
      return file;
    };
    part(".mf-photo").addEventListener("change", (event) => take(chosen(event)));
    part(".mf-mask").addEventListener("change", async (event) => {
      const file = chosen(event);
      if (!file) return;
      const [of, turn] = [e.turn, (e.maskTurn = ++turns)];
      const base64 = await base64Of(file);
      if (e.turn === of && e.maskTurn === turn) await setMask(e, base64);
    });
    root.addEventListener("dragover", (event) => {
      event.preventDefault();
      root.classList.add("mf-over");
    });
    root.addEventListener("dragleave", () => root.classList.remove("mf-over"));
    root.addEventListener("drop", (event) => {
      event.preventDefault();
      root.classList.remove("mf-over");
      take(event.dataTransfer.files[0]);
    });

    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [
        ((event.clientX - box.left) * canvas.width) / box.width,
        ((event.clientY - box.top) * canvas.height) / box.height,
      ];
    };
    let last = null;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      remember(e);
      e.cursor = null;
      last = place(event);
      stroke(e, last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = place(event);
      stroke(e, last, next);
      last = next;
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
    canvas.addEventListener("keydown", (event) => key(e, event));
    canvas.addEventListener("focus", () => show(e));
    canvas.addEventListener("blur", () => show(e));

    part(".mf-erase").addEventListener("click", () => {
      e.erasing = !e.erasing;
      show(e);
    });
    part(".mf-undo").addEventListener("click", () => undo(e));
    part(".mf-fill").addEventListener("click", () => fill(e, true));
    part(".mf-clear").addEventListener("click", () => fill(e, false));
    part(".mf-save").addEventListener("click", () => {
      download(`data:image/png;base64,${exported(e)}`, fileNames().get(e.slot).mask);
    });
    show(e);
    if (wanted === e.slot) {
      wanted = 0;
      part(".mf-photo").focus();
    }
  };

  const key = (e, event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const size = e.root.querySelector(".mf-size");
    const { width, height } = e.mask;
    e.cursor ||= [width / 2, height / 2];
    if (event.key in ways) {
      const far = event.shiftKey ? 1 : Math.max(1, brush(e));
      const [dx, dy] = ways[event.key];
      e.cursor = [
        Math.min(width, Math.max(0, e.cursor[0] + far * dx)),
        Math.min(height, Math.max(0, e.cursor[1] + far * dy)),
      ];
      show(e);
    } else if (event.key === " " || event.key === "Enter") {
      remember(e);
      stroke(e, e.cursor, e.cursor);
    } else if (event.key === "e") {
      e.erasing = !e.erasing;
      show(e);
    } else if (event.key === "z") {
      undo(e);
    } else if (event.key === "+" || event.key === "-") {
      size.value = Number(size.value) + (event.key === "+" ? 5 : -5);
      show(e);
    } else {
      return;
    }
    event.preventDefault();
  };

  const download = (url, name) => {
    const link = document.createElement("a");
    [link.href, link.download] = [url, name];
    link.click();
  };

  document.addEventListener("click", (event) => {
    const link = event.target.closest?.(".mf-download");
    if (!link) return;
    event.preventDefault();
    download(link.closest("figure").querySelector("img").src, link.download);
  });

  // ------------------------------------------------------------------------------------- for Gradio's events

  const onPage = () => [...editors.values()].filter((e) => e.root?.isConnected).sort((a, b) => a.slot - b.slot);

  // The names of photographs and masks in the calls that the page shows, by concept. file_names.py has the same rules,
  // and leaves names that were made here as they are.
  const fileNames = () => {
    const taken = new Set(["out.png"]);
    const found = new Map();
    for (const e of onPage().filter((one) => one.image)) {
      const [stem, ending] = stemAndEnding(e);
      for (const one of numbered(stem, e.slot)) {
        const names = { image: one + ending, mask: `${maskStem(one, e.slot)}-mask.png` };
        const keys = [names.image.toLowerCase(), names.mask.toLowerCase()];
        if (keys.some((key) => taken.has(key))) continue;
        keys.forEach((key) => taken.add(key));
        found.set(e.slot, names);
        break;
      }
    }
    return found;
  };

  const stemAndEnding = ({ name, slot }) => {
    const dot = name.lastIndexOf(".");
    const [stem, suffix] = dot < 0 ? [name, ""] : [name.slice(0, dot), name.slice(dot + 1)];
    if (!NO_NAME.test(name) && new TextEncoder().encode(name).length <= MOST_NAME) {
      return [stem, dot < 0 ? "" : `.${suffix}`];
    }
    const plain = stem.replace(/[^A-Za-z0-9._-]+/gu, "-").slice(0, 100).replace(/^[-.]+|[-.]+$/g, "");
    const end = suffix.replace(/[^A-Za-z0-9._-]+/gu, "").slice(0, 10).toLowerCase();
    return [plain || `photograph-${slot}`, `.${end || "png"}`];
  };

  const maskStem = (stem, slot) => {
    const saved = stem.replace(NOT_SAVED, "-");
    return saved === stem ? stem : saved.replace(/^[-. ]+|[-. ]+$/g, "") || `photograph-${slot}`;
  };

  const numbered = function* (stem, slot) {
    yield stem;
    yield `${stem}-${slot}`;
    for (let number = 2; ; number++) yield `${stem}-${slot}-${number}`;
  };

  // Whether the mask was painted over the photograph as the service will turn it: of the files whose EXIF orientation
  // the service heeds, those in JPEG are turned upright by every browser.
  const painted = (e) => Boolean(e.mask) && e.loaded === null && typeOf(e.image) === "image/jpeg";

  const collect = () => {
    const names = fileNames();
    const found = onPage().map((e) => ({
      slot: e.slot,
      image: e.image,
      mask: maskOf(e),
      name: names.get(e.slot)?.image ?? "",
      painted: painted(e),
    }));
    const text = JSON.stringify(found);
    const most = Number(document.querySelector(".mf-header").dataset.mostBytes);
    if (text.length + 65536 > most) {
      const megabytes = (bytes) => (bytes / 1048576).toFixed(1);
      const problem =
        `the photographs and masks take ${megabytes(text.length)} MiB as they are sent; at most ` +
        `${megabytes(most)} MiB are taken. Scale the photographs down.`;
      return JSON.stringify({ problem });
    }
    return text;
  };

  const free = () => {
    const taken = new Set(onPage().map((e) => e.slot));
    wanted = 1;
    while (taken.has(wanted)) wanted += 1;
    return [String(wanted)];
  };

  const drop = (slot) => {
    const e = editor(slot);
    Object.assign(e, emptyEditor(slot), { root: e.root });
    show(e);
  };

  const load = async (text) => {
    for (const slot of editors.keys()) drop(slot);
    for (const one of JSON.parse(text || "[]")) await setPhotograph(editor(one.slot), one.image, one.name, one.mask);
    return [""];
  };

  // ------------------------------------------------------------------------------------------------ regions

  const regions = (element) => {
    const figure = element.querySelector(".mf-regions");
    if (!figure) return;
    const picture = element.querySelector(".mf-picture");
    const slider = figure.querySelector("input");
    const draw = () => drawRegions(figure, picture, Number(slider.value));
    slider.oninput = draw;
    if (picture.complete) draw();
    else picture.onload = draw;
  };

  const drawRegions = (figure, picture, step) => {
    const { rows, columns, labels, stages, colours, names } = JSON.parse(figure.dataset.regions);
    const cells = Uint8Array.from(atob(labels), (c) => c.charCodeAt(0)).subarray(
      (step - 1) * rows * columns,
      step * rows * columns,
    );
    const canvas = figure.querySelector("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    const [w, h] = [canvas.width / columns, canvas.height / rows];
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    context.fillStyle = "rgba(0, 0, 0, 0.25)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const counts = names.map(() => 0);
    const sums = names.map(() => [0, 0]);
    const label = (row, column) => cells[row * columns + column];
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const k = label(row, column) - 1;
        if (k < 0) continue;
        counts[k] += 1;
        sums[k][0] += column + 0.5;
        sums[k][1] += row + 0.5;
        context.fillStyle = `${colours[k]}99`;
        context.fillRect(column * w, row * h, w, h);
      }
    }
    context.fillStyle = "white";
    const line = Math.max(1, Math.round(canvas.height / 256));
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        if (column && label(row, column) !== label(row, column - 1)) context.fillRect(column * w, row * h, line, h);
        if (row && label(row, column) !== label(row - 1, column)) context.fillRect(column * w, row * h, w, line);
      }
    }
    number(context, counts, sums, [w, h], label, rows, columns);
    const share = (k) => `${((100 * counts[k]) / (rows * columns)).toFixed(0)} %`;
    for (const text of figure.querySelectorAll(".mf-share")) {
      text.textContent = `(${share(Number(text.dataset.concept) - 1)})`;
    }
    const stage = stages[step - 1] === "RBA" ? "second stage (RBA)" : "first stage (RSA)";
    figure.querySelector(".mf-stage").textContent = `Step ${step} of ${stages.length}, ${stage}`;
    const described = names.map((name, k) => `${name} ${share(k)}`).join(", ");
    canvas.setAttribute("aria-label", `Regions after step ${step}: ${described} of the picture`);
  };

  // The concept's number in its region, at the cell that is nearest to the region's middle.
  const number = (context, counts, sums, [w, h], label, rows, columns) => {
    const size = Math.max(12, Math.round(context.canvas.height / 16));
    context.font = `bold ${size}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    counts.forEach((count, k) => {
      if (!count) return;
      const [x, y] = [sums[k][0] / count, sums[k][1] / count];
      let [best, far] = [null, Infinity];
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          const away = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2;
          if (label(row, column) === k + 1 && away < far) [best, far] = [[column + 0.5, row + 0.5], away];
        }
      }
      context.lineWidth = size / 5;
      context.strokeStyle = "black";
      context.strokeText(String(k + 1), best[0] * w, best[1] * h);
      context.fillStyle = "white";
      context.fillText(String(k + 1), best[0] * w, best[1] * h);
    });
  };

  return { mount, collect, free, drop, load, regions };
})();
