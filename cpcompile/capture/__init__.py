"""From a model to a graph: one pre-dispatch ATen graph of the whole model, with the user's lines on every node.

In: a model and its arguments. Out: the graph that the passes work on, which is still a single-device program, and which of
its inputs hold tokens. Here: how Dynamo is called, the lowering of what it hands over, and what operators in place mean as
values (`writes`). May import `options` and below.
"""
