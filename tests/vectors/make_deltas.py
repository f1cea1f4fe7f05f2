"""Write the golden vectors of deltas: `python -m tests.vectors.make_deltas`.

Not part of `generate`: another zstd may compress the same bytes otherwise, so these are decoded again and never
made again. A changed vector is a change of the format.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from tests.protos.test_delta import HEADER_BYTES, lossless, of_segments, weights
from tests.vectors.kinds import FOLDER
from umbel.delta import ADD, KEEP, XOR, rebuild, segment, xored
from umbel.digests import digest_of
from umbel.errors import UmbelError
from umbel.manifest import FileRef
from umbel.quantised import quantise

SHAPES = {"p_dense": (4, 20), "p_bias": (4,), "b_mean": (70,)}


def cases(base: bytes) -> dict[str, tuple[bytes, bytes]]:
    """Name -> the delta and the target that a signed source promises."""
    new = weights(0.01, **SHAPES).to_bytes()
    made, good = quantise(base, new), lossless(base, new)
    steps, scales = np.full((2, 3), -127, np.int8), np.array([0.001, 3.0], "<f4")
    summed = base[:-24] + _sums(base[-24:], steps, scales)
    by_hand = (segment(KEEP, len(base) - 24), segment(ADD, 2, 3), scales.tobytes(), steps.tobytes())
    spoilt = bytearray(good)
    spoilt[HEADER_BYTES + 48] ^= 4
    return {
        "lossless": (good, new),
        "int8": (made.delta, made.weights),
        "kept, then two rows by hand": (of_segments(base, summed, *by_hand), summed),
        "nothing moved": (lossless(base, base), base),
        "of another base": (lossless(new, new), new),
        "to another file": (good, base),
        "yields other content": (of_segments(base, new, segment(XOR, len(base)), xored(base, base)), new),
        "tampered": (bytes(spoilt), new),
        "truncated": (good[:-9], new),
        "only a header": (good[:HEADER_BYTES], new),
        "empty": (b"", new),
        "unknown form": (b"umbel-delta/9\0\0\0" + good[16:], new),
        "unknown segment": (of_segments(base, new, segment(7, len(base))), new),
        "a segment longer than the file": (of_segments(base, new, segment(KEEP, len(base) + 1)), new),
        "goes on after the file": (of_segments(base, base, segment(KEEP, len(base)), b"\0"), base),
        "ends before the file": (of_segments(base, new, segment(KEEP, 8)), new),
        "a payload that is announced too long": (of_segments(base, new, b"\0", size=1 << 40), new),
    }


def _sums(base: bytes, steps: np.ndarray, scales: np.ndarray) -> bytes:
    old = np.frombuffer(base, "<f4").reshape(2, 3)
    return (old + steps.astype("<f4") * scales[:, None]).astype("<f4").tobytes()


def main() -> None:
    """Write `delta.json`."""
    base = weights(**SHAPES).to_bytes()
    vectors: list[dict[str, Any]] = []
    for name, (delta, target) in cases(base).items():
        ref = FileRef(digest_of(target), len(target))
        entry: dict[str, Any] = {"name": name, "hex": delta.hex(), "target": ref.digest, "size": ref.size}
        out = io.BytesIO()
        try:
            rebuild(io.BytesIO(delta), io.BytesIO(base), out, digest_of(base), ref)
            entry["value"] = out.getvalue().hex()
        except UmbelError as error:
            entry["error"] = error.code
        vectors.append(entry)
    tree = {
        "about": "umbel-delta/1: `hex` and the base make `value`, whose digest and size are promised, or are refused",
        "context": {"base": base.hex()},
        "vectors": vectors,
    }
    (FOLDER / "delta.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
