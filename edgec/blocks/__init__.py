"""A model run block by block, for those who compress what they cannot hold: `walker.BlockWalker` is the way in."""
