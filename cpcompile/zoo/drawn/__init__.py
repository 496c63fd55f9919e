"""Drawn: configurations drawn at random over the zoo, each run by `cpcompile.verify` and reproducible by seed and index.

In: a seed and an index. Out: what the model is, what it is given and how it is sharded (`draw`, `heads`, `settings`,
`batch`), what became of it (`run`) and the tables over many (`summary`). The other rooms of the zoo build, run and classify.
"""
