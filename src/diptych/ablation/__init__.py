"""Ablations: a grid of configurations x seeds on the packaged world, resumable, with statistics and a page.

A *suite* (`suite`) is a YAML file: a question, variants of the demo's settings, and what to measure. Each variant and seed is
a *trial* (`trials`), run by worker processes (`runner`, `worker`); `summary` makes one record of a suite's finished trials, from
which the terminal's table, the page (`pages`) and the document (`documents`) are written. `statistics` knows numbers only.
"""
