// A picture that is chosen, and a brush on it. It runs once for each such part of the page, with
// `element`, its place there, `props`, and `server.prepare`, which crops and scales the picture.
//
// What is chosen and marked is kept in window.mdtPictures under the part's name, where the buttons
// take it from: {picture: data URL, mask: a text of a 1 or 0 for each pixel}.
window.mdtPictures = window.mdtPictures || {};
const name = props.part, side = props.side, paints = props.paints;
const find = (what) => element.querySelector(`.mdt-${what}`);
const file = find("file"), canvas = find("canvas"), says = find("says");
const pen = canvas.getContext("2d");
const size = canvas.width, cell = size / side;
const shown = new Image();
let mask = new Uint8Array(side * side), radius = Math.max(0.5, side / 16);
let cursor = null, stroke = null, erases = false, number = 0;
window.mdtPictures[name] = {picture: "", mask: ""};

function draw() {
  pen.fillStyle = "#eee";
  pen.fillRect(0, 0, size, size);
  pen.imageSmoothingEnabled = side >= 128;
  if (shown.src) pen.drawImage(shown, 0, 0, size, size);
  pen.fillStyle = "rgba(214, 40, 110, 0.6)";
  for (let at = 0; at < mask.length; at++) {
    if (mask[at]) pen.fillRect((at % side) * cell, Math.floor(at / side) * cell, cell, cell);
  }
  if (cursor) {
    pen.strokeStyle = "#000";
    pen.lineWidth = 3;
    for (const colour of ["#fff", "#000"]) {
      pen.strokeStyle = colour;
      pen.beginPath();
      pen.arc(cursor.x * cell, cursor.y * cell, Math.max(radius * cell, 4), 0, 2 * Math.PI);
      pen.stroke();
      pen.lineWidth = 1;
    }
  }
}

function keep() {
  window.mdtPictures[name].mask = Array.from(mask).join("");
  const share = mask.reduce((sum, one) => sum + one, 0) / mask.length;
  if (paints && shown.src) say(`${Math.round(100 * share)}% of the picture is marked.`);
}

function say(text) {
  says.textContent = text;
}

// Marks the pixels whose centres are under the brush, and the one that the brush's middle is in.
function mark(x, y) {
  const from = (at) => Math.max(0, Math.floor(at - radius));
  const to = (at) => Math.min(side - 1, Math.floor(at + radius));
  for (let row = from(y); row <= to(y); row++) {
    for (let column = from(x); column <= to(x); column++) {
      const near = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius ** 2;
      const under = Math.floor(x) === column && Math.floor(y) === row;
      if (near || under) mask[row * side + column] = erases ? 0 : 1;
    }
  }
}

function line(from, to) {
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(to.x - from.x, to.y - from.y)));
  for (let k = 0; k <= steps; k++) {
    mark(from.x + (to.x - from.x) * k / steps, from.y + (to.y - from.y) * k / steps);
  }
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: (event.clientX - box.left) / box.width * side,
    y: (event.clientY - box.top) / box.height * side,
  };
}

file.addEventListener("change", () => {
  const chosen = file.files[0], mine = ++number;
  if (!chosen) return;
  if (chosen.size > props.most_bytes) {
    say(`The file is larger than ${Math.round(props.most_bytes / 2 ** 20)} MiB.`);
    return;
  }
  const reader = new FileReader();
  reader.onload = async () => {
    say("Reading the picture …");
    let answer;
    try {
      answer = await server.prepare(reader.result);
    } catch (error) {
      answer = {error: "The server does not answer; is it still running?"};
    }
    if (mine !== number) return;  // another file was chosen meanwhile
    if (answer.error) {
      say(answer.error);
      return;
    }
    shown.onload = () => {
      draw();
      keep();
      if (!paints) say(`The picture is shown as the model takes it, ${side} × ${side} pixels.`);
    };
    mask.fill(0);
    canvas.classList.remove("unused");
    shown.src = answer.picture;
    window.mdtPictures[name].picture = answer.picture;
  };
  reader.readAsDataURL(chosen);
});

if (paints) {
  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    canvas.focus();
    stroke = cursor = place(event);
    mark(stroke.x, stroke.y);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    cursor = place(event);
    if (stroke) {
      line(stroke, cursor);
      stroke = cursor;
    }
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      stroke = null;
      keep();
    });
  }
  canvas.addEventListener("pointerleave", () => {
    if (!stroke) cursor = null;
    draw();
  });
  canvas.addEventListener("blur", () => {
    cursor = null;
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    const step = Math.max(1, Math.round(radius / 2)), move = moves[event.key];
    if (!move && event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    cursor = cursor || {x: Math.floor(side / 2) + 0.5, y: Math.floor(side / 2) + 0.5};
    if (move) {
      const within = (value) => Math.min(Math.max(value, 0.5), side - 0.5);
      cursor = {x: within(cursor.x + move[0] * step), y: within(cursor.y + move[1] * step)};
      say(`Column ${Math.floor(cursor.x) + 1}, row ${Math.floor(cursor.y) + 1} of ${side}.`);
    } else {
      mark(cursor.x, cursor.y);
      keep();
    }
    draw();
  });
  find("brush").addEventListener("input", (event) => {
    radius = Number(event.target.value);
    draw();
  });
  find("eraser").addEventListener("change", (event) => {
    erases = event.target.checked;
  });
  find("clear").addEventListener("click", () => {
    mask.fill(0);
    draw();
    keep();
  });
  find("all").addEventListener("click", () => {
    mask.fill(1);
    draw();
    keep();
  });
  find("half").addEventListener("click", () => {
    mask = mask.map((_, at) => (at % side >= side / 2 ? 1 : 0));
    draw();
    keep();
  });
}
draw();
