// An answer begins: it is brought to the reader, unless it is in sight. `turn` is none where nothing was asked.
(turn) => {
  const pane = document.querySelector('#pane-0');
  const { top } = pane.getBoundingClientRect();
  if (turn && (top < 0 || top > 0.7 * innerHeight)) pane.scrollIntoView();
}
