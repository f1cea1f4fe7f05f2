"""The cohort engine: many clients trained side by side, without a protocol, for work on algorithms.

The same plan, the same training graph and the same Flower strategy as a real fleet; `docs/decisions/0015` says how.
"""
