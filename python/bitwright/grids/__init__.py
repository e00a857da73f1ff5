"""Number formats. A module here has GRIDS, a dict from name to Grid."""

NAMES = ("int", "fp", "nf", "bfp")
