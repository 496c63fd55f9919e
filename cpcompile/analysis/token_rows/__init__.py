"""Token rows: the operators that compute each token's row of a value from that token's rows alone, found from one value on.

A value holds rows if its leading dims are those of the tokens, in one order, and `inner` dims behind them are what each token
has. Here all of them are written again with one dim in the place of the leading ones, so that they run for some tokens.
"""

from cpcompile.analysis.token_rows.find import follow, region_of, wide_region_of
from cpcompile.analysis.token_rows.region import NotByRowsError, RowRegion, static

__all__ = ["NotByRowsError", "RowRegion", "follow", "region_of", "static", "wide_region_of"]
