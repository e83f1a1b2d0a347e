// Draws the figures of a report, each from the data behind its place, and colours tokens by what is chosen.
for (const place of document.querySelectorAll('.figure')) {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
addEventListener('load', () => {  // drawn while the page is still being laid out
  for (const place of document.querySelectorAll('.figure')) Plotly.Plots.resize(place);
});
for (const button of document.querySelectorAll('input[name=by]'))
  button.addEventListener('change', () => { document.body.dataset.by = button.value; });
