"""An evaluation as one HTML file that can be copied off a cluster, sent, and opened anywhere.

The file holds everything: pictures as data URIs, charts as SVG in the page's own colours, style and script. Nothing is
fetched, and without script all is still there, in the grid of reconstructions. Every value that comes from a run or
from data is escaped (Jinja2's autoescape); only what `charts` draws is put in as it is, and its texts are escaped by
matplotlib.

| module | what |
|---|---|
| `contents` | what one run has to show, gathered by what its model can do |
| `charts` | lines, bars and points, drawn by matplotlib |
| `page` | the file |
"""
