"""The choice: a layout for the model, and a strategy and a kernel for each attention.

In: the attentions of a graph as numbers (`attention_sites`). Out: what costs the slowest rank least (`cost`), and which
kernels will compute it (`kernels`). May import `runtime` and below.
"""
