"""The functions behind `spatial-forcing`; thin: they read options, call the package and print."""
