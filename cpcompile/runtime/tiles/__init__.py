"""What is computed for a tile of tokens at a time, so that little of it is in memory: functions of rows, and losses of logits.

In: a function as a graph, its operands and how many tokens a tile has. Out: its results for all tokens, and their gradients.
`by_rows` runs any function of each token's row; `chunked_loss` runs what is computed of logits (`loss_body`), by itself or by the
package that a user has for it (`loss_providers`). May import `kernels` and below.
"""
