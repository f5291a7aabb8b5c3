// A word of the answer was chosen; `element` and `trigger` are Gradio's.
element.addEventListener('change', (event) => {
  if (event.target.name) trigger('word', { row: Number(event.target.value) });
});
