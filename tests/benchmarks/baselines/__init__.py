"""Other ways to simulate the same rounds, each a program of its own; `tests/benchmarks/simulation.py` runs them."""
