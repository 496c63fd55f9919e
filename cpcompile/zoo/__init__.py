"""The zoo: every transformers architecture as a tiny random model, run through `cpcompile.verify`.

`python -m cpcompile.zoo` runs them and writes a table of what is exact, refused (and why), wrong, or a crash.
"""
