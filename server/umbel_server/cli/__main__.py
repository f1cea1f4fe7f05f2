"""`python -m umbel_server.cli` is `umbel`."""

from umbel_server.cli import main

main()
