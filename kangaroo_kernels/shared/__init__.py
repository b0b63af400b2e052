"""What the kernels share: tiles, the cache's layout, noise, chained launches, the grid's barrier, checks."""
