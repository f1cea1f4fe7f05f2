"""The Open Inference Protocol's own messages: package `inference`, as KServe, Triton and their clients speak it.

Not ours to change: `https://github.com/kserve/open-inference-protocol`. What generates or loads the same names in one
process with these (Triton's Python client does) is refused by protobuf; programs of their own are not concerned.
"""
