"""The global model as a service, for callers that can't run it themselves.

    gateway    Open Inference Protocol over gRPC: messages in, a question to `inference`, messages out
    tensors    the protocol's tensors <-> arrays
    inference  questions -> answers: queued, run beside the rounds, recorded
    served     which version answers to which name, loaded and checked before it does

See `docs/how-to/ask-over-the-network.md`, and `docs/decisions/0020-…` for why it is as it is.
"""
