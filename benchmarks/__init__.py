"""Speed and memory, measured; figures are in BENCHMARKS.md."""
