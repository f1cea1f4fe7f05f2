"""The roof: fleets on one machine, made of the same server and the same devices."""

import umbel as umbel  # before any module here loads ONNX Runtime: see there
