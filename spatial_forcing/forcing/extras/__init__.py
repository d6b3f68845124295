"""Options beyond the paper's recipe. Each file is one change, used in one place of `module` or `target`."""
