"""Lowered signatures as ONNX files: default domain, opset 20, dynamic batch, bytes that repeat.

A translator of its own, not `torch.onnx`: ten times quicker, half as large, and it says which operator it lacks.
`graph.py` holds the writer, the other modules one family of operators each.
"""

from umbel_models.onnx.export import export, external_weights

__all__ = ["export", "external_weights"]
