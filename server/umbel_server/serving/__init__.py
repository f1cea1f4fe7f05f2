"""The global model as a service, for callers that can't run it themselves.

    gateway    Open Inference Protocol over gRPC: messages in, a question to `inference`, messages out
    rest       the same over HTTP: rest_messages are its JSON, http_exchange its bodies
    tensors    the protocol's tensors <-> arrays
    about      what a server and its models tell of themselves
    inference  questions -> answers: queued, run beside the rounds, recorded
    served     which version answers to which name, loaded and checked before it does

See `docs/how-to/ask-over-the-network.md`, and `docs/decisions/0020-…` for why it is as it is.
"""
