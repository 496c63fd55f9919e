"""The door: what a user's call goes through, once when it compiles and at each step.

In: a model, a mesh and options. Out: the same model, whose calls run this rank's part of the program. Here: `apply` and its
relatives, the `torch.compile` backend, the sum of gradients over the ranks, and the check that all ranks were given the same.
May import `inspect` and below.
"""
