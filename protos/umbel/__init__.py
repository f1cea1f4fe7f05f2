"""The agreement: messages, and everything that both sides must compute identically.

Nothing here knows a server, a device or a clock of its own; see `docs/explanation/architecture.md`.
"""

import os

# ONNX Runtime (1.29 and later, on Linux too) tells its maker about machine and models, unless this is set before it is
# imported; and it makes an id of the machine in the user's home.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
