"""What a graph says: masks, forms of attention and token-local regions, read out of ordinary operators.

In: a captured graph. Out: descriptions (a mask as an expression, the parts of an attention, the nodes of a region) that
passes act on. May import `capture` and below.
"""
