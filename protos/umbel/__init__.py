"""The agreement: messages, and everything that both sides must compute identically.

Nothing here knows a server, a device or a clock of its own; see `docs/explanation/architecture.md`.
"""
