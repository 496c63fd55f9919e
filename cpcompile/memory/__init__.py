"""Memory: what a training step holds on a rank, predicted before anything runs, and the plan that fits a device.

In: a transformed graph of fake tensors. Out: a `Ledger`. May import `compile` and below.
"""
