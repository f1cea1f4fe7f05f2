"""The fleet engine: a real coordinator and real devices, joined in one process, on virtual time."""
