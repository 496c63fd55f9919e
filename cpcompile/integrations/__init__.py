"""Training frameworks over `apply`: one line makes an Accelerator, a Trainer or a Lightning strategy context parallel.

In: an object of a framework that has its model already. Out: the same object; its model is context parallel, the ranks of a group
get the same batches, and metrics count each of them once. One file for each framework, which is imported only there.
May import `front` and below.
"""
