"""Options that the paper does not have. Each file is one change of the target, applied by `make_targets`."""
