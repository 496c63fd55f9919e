"""Names of other packages over this runtime, so that scripts written for them run here.

In: calls as axolotl, OLMo-core and ring-flash-attn take them. Out: what these packages return. May import `front` and below.
"""
