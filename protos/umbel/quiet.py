"""Imported first by programs for people: keeps gRPC's own log of failed handshakes off their screens and out of logs.

The errors say it already. gRPC reads the variable once, when it is first imported, so that a function would come late.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
