"""Ranks as processes: the applied model, run as training runs it, against the untouched one.

In: a function that makes a model and its inputs, and a number of ranks. Out: the comparison, with what `inspect` compares too.
May import `front` and below.
"""
