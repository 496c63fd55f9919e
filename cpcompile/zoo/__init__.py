"""The zoo: every transformers architecture as a tiny random model, run through `cpcompile.verify`.

In: names of architectures and programs. Out: a table of what is exact, refused (and why), wrong, or a crash, which
`python -m cpcompile.zoo` writes. May import `inspect` and below.
"""
