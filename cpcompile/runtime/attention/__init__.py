"""Attention whose tokens are sharded: one file for each strategy, and what they share.

A strategy (`ring`, `gather`, `ulysses`, `latent`, `latent_heads`; `halo` is a gather of neighbours, `usp` a ring of groups
that exchange heads) is a forward and a backward. `catalogue` has their names and what the compiler must know of each,
`strategies` makes operators of them, `arguments` says what all of these take, `workload` what each rank computes and sends,
before anything runs. In: this rank's q, k and v. Out: its rows of the result. May import `kernels` and below.
"""
