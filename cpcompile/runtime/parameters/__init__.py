"""Parameters over ranks: gradients of whole ones are summed (`gradient_sums`), those that FSDP shards are gathered (`unshard`).

In: a parameter or its shard. Out: the parameter as the model uses it; its adjoint brings every rank the gradient. May import
`transport` and below.
"""
