"""The coordinator: enrols devices, runs rounds, keeps and signs versions, and answers operators.

What it agrees on with devices stands in `umbel`; it never imports the device SDK.
"""
