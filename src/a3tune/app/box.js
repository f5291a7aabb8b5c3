// A box drawn on the image: dragged with a mouse or a pen, two taps with a finger (a finger's drag scrolls the page).
// Ends as the event 'box' with the corners in pixels of the image. The listeners are on the component, whose content
// changes; `element` and `trigger` are Gradio's.
let start = null;

const pixel = (event, stage) => {
  const frame = stage.getBoundingClientRect();
  const share = (at, low, size) => Math.min(1, Math.max(0, (at - low) / size));
  return [
    Math.round(share(event.clientX, frame.left, frame.width) * stage.dataset.width),
    Math.round(share(event.clientY, frame.top, frame.height) * stage.dataset.height),
  ];
};

const corners = (a, b) => ({
  left: Math.min(a[0], b[0]), top: Math.min(a[1], b[1]), right: Math.max(a[0], b[0]), bottom: Math.max(a[1], b[1]),
});

const show = (stage, box) => {
  const band = stage.querySelector('.band');
  band.hidden = false;
  band.style.left = `${(100 * box.left) / stage.dataset.width}%`;
  band.style.top = `${(100 * box.top) / stage.dataset.height}%`;
  band.style.width = `${(100 * (box.right - box.left)) / stage.dataset.width}%`;
  band.style.height = `${(100 * (box.bottom - box.top)) / stage.dataset.height}%`;
};

const finish = (stage, end) => {
  const box = corners(start, end);
  start = null;
  stage.querySelector('.band').hidden = true;
  if (box.right > box.left && box.bottom > box.top) trigger('box', box);
};

element.addEventListener('pointerdown', (event) => {
  const stage = event.target.closest('.stage');
  if (!stage || event.button !== 0 || event.pointerType === 'touch') return;
  event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  start = pixel(event, stage);
});
element.addEventListener('pointermove', (event) => {
  const stage = event.target.closest('.stage');
  if (stage && start && event.pointerType !== 'touch') show(stage, corners(start, pixel(event, stage)));
});
element.addEventListener('pointerup', (event) => {
  const stage = event.target.closest('.stage');
  if (stage && start && event.pointerType !== 'touch') finish(stage, pixel(event, stage));
});
element.addEventListener('click', (event) => {
  const stage = event.target.closest('.stage');
  if (!stage || event.pointerType !== 'touch') return;
  const at = pixel(event, stage);
  if (start) return finish(stage, at);
  start = at;
  show(stage, corners(at, at));
});
