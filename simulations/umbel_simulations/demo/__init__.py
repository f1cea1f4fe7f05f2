"""The main job on one machine, with real programs: a coordinator, twenty devices, real recordings.

`make demo` runs it. It does what an operator and twenty app users would do, through the same commands: nothing here
reaches into a server or a device. Light to import: each device process starts from this package too.
"""
