"""The global model as a service, for callers that can't run it themselves.

    gateway    Open Inference Protocol over gRPC: messages in, a question to `inference`, messages out
    rest       the same over HTTP: rest_messages are its JSON, http_exchange its bodies
    tensors    the protocol's tensors <-> arrays
    about      what a server and its models tell of themselves
    inference  questions -> answers: queued, run beside the rounds, recorded
    log        a record of each question
    catalogue  which version is meant by a name
    served     the versions that answer, loaded and checked before they do
    service    puts one coordinator's together

See `docs/how-to/ask-over-the-network.md`, and `docs/decisions/0020-serving-by-the-open-inference-protocol.md` for why.
"""
