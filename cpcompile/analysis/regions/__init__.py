"""Token-local regions: parts of a model that compute each token from that token alone, whatever operators they use."""

from cpcompile.analysis.regions.declare import token_local
from cpcompile.analysis.regions.find import Region, find_regions, regions_of
from cpcompile.analysis.regions.picked_rows import STARTS, Picked, Step, is_picked_by_mask
from cpcompile.analysis.regions.place import place_region, replace_inputs

__all__ = [
    "STARTS",
    "Picked",
    "Region",
    "Step",
    "find_regions",
    "is_picked_by_mask",
    "place_region",
    "regions_of",
    "replace_inputs",
    "token_local",
]
