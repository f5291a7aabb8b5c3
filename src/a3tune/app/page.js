() => {
  // An image is sent without the name of its file, which may name a patient.
  document.addEventListener('change', (event) => {
    const input = event.target;
    if (input.type !== 'file' || !input.files.length) return;
    const [file] = input.files;
    const nameless = new DataTransfer();
    nameless.items.add(new File([file], 'image', { type: file.type }));
    input.files = nameless.files;
  }, true);

  // Gradio's groups of radio buttons have a title that screen readers do not connect with them.
  const name = () => document.querySelectorAll('fieldset:not([aria-label])').forEach((group) => {
    const title = group.querySelector('[data-testid="block-info"]');
    if (title) group.setAttribute('aria-label', title.textContent.trim());
  });
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
