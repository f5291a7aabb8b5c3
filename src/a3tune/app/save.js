(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = file.href;
  link.download = file.name;
  link.click();
}
