"""An evaluation as one HTML file that can be copied off a cluster, sent, and opened anywhere.

The file holds everything: pictures as data URIs, charts as SVG in the page's own colors, style and script. Nothing is
fetched, and without script everything is still there, in the grid of reconstructions. Every value that comes from a
run or from data is escaped (Jinja2's autoescape); only what `charts` draws is put in as it is, and its texts are
escaped by matplotlib.

| module | what |
|---|---|
| `content` | what the template fills in: sections, tables, pictures |
| `sections` | the sections of one run, by what its model can do |
| `latent_section` | the map of the latents, and ways through them |
| `training_curves` | loss, KID and others over training steps |
| `charts` | lines, bars and points, drawn by matplotlib |
| `page` | the file |
"""
