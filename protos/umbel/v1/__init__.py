"""Generated from the protos in this folder; `make protos` writes it anew. Speak it through `umbel.messages`."""
