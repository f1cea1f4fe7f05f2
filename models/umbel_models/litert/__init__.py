"""Lowered signatures as LiteRT files: builtin operators only, dynamic batch, bytes that repeat.

A translator of its own, as for ONNX: no second framework, a second of work instead of a minute, and the batch stays
open (`docs/decisions/0006-litert-without-a-converter.md`). `graph.py` holds the writer, `flatbuffer.py` packs what
it collected, the other modules hold one family of operators each.
"""

from umbel_models.litert.decompositions import KEPT, litert_table
from umbel_models.litert.export import export

__all__ = ["KEPT", "export", "litert_table"]
